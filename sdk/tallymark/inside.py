"""`tallymark.usage`: what a handler says of its own call, where neither its arguments nor its result tell."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from tallymark import quantities, runtime
from tallymark.dimensions import Value
from tallymark.quantities import RefusedQuantityError, exact
from tallymark.recording import checked_attributes
from tallymark.tracked import MAX_AMOUNTS, TrackedCall, current_tracked


class CurrentUsage:
    """The call that runs, if it is declared with `quantity=measure.inside`."""

    def add(
        self,
        quantity: int | float | Decimal,
        meter: str | None = None,
        *,
        attributes: Mapping[str, Value] | None = None,
    ) -> None:
        """Add to what the running call is counted by; it is recorded when the call ends, however that is.

            @track_usage("credits", measure.inside, unit="{credit}")
            def handler(): ...  usage.add(3)

        `meter` picks one where several are stacked; left out, it is the innermost. `attributes` are dimensions of this
        amount. Callable from everything that the handler calls, in its threads and tasks too where they have its
        context. Never raises: outside of such a call, and for what cannot be counted, it warns on the logger
        `tallymark`. `tallymark.record()` needs no call around it.
        """
        into = runtime.current()
        if not into.enabled:
            return
        try:
            tracked = _find(meter)
            if tracked is None:
                into.reporter.error(
                    f"inside.{meter}",
                    "usage.add() is not counted: no call with quantity=measure.inside%s is running here; "
                    "outside of one, call tallymark.record()",
                    "" if meter is None else f" of meter {meter}",
                )
                into.recorder.refuse(str(meter or "usage.add"))
                return
            counted = tracked.tally.meter
            try:
                number = exact(quantity)
            except RefusedQuantityError as error:
                into.recorder.refuse(counted.name)
                into.reporter.warning(
                    f"refused.{counted.name}", "a quantity of meter %s is refused: %s", counted.name, error
                )
                return
            key = checked_attributes(into, counted, attributes) if attributes else ()
            if key not in tracked.added and len(tracked.added) >= MAX_AMOUNTS:
                into.reporter.warning(
                    f"inside.{counted.name}", "over %d sets of attributes in one call: the rest has none", MAX_AMOUNTS
                )
                key = ()
            tracked.added[key] = quantities.add(tracked.added.get(key, 0), number)
        except Exception as error:
            into.reporter.error("inside", "usage.add() is not counted: %s", type(error).__name__, exc_info=error)

    def __repr__(self) -> str:
        return "tallymark.usage"


def _find(meter: str | None) -> TrackedCall | None:
    tracked = current_tracked.get()
    while tracked is not None:
        measure = tracked.tally.measure
        if tracked.live and measure is not None and measure.is_inside and meter in (None, tracked.tally.meter.name):
            return tracked
        tracked = tracked.outer
    return None


usage = CurrentUsage()
