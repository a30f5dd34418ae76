"""`tallymark.usage`: what a handler says of its own call, where neither its arguments nor its result tell."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.dimensions import Value
from tallymark.nesting import Running, current_running
from tallymark.quantities import RefusedQuantityError, exact
from tallymark.recording import checked_attributes


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
        amount; past 1,000 sets of them in one call the rest has none. Callable from everything that the handler calls,
        in its threads and tasks too where they have its context, until the call has ended. Never raises: outside of
        such a call, and for what cannot be counted, it warns on the logger `tallymark`. `tallymark.record()` needs no
        call around it.
        """
        into = runtime.current()
        if not into.enabled:
            return
        try:
            running = _find(meter)
            if running is None:
                _refuse(into, meter)
                return
            counted = running.tally.meter
            try:
                number = exact(quantity)
            except RefusedQuantityError as error:
                into.recorder.refuse(counted.name)
                into.reporter.warning(
                    f"refused.{counted.name}", "a quantity of meter %s is refused: %s", counted.name, error
                )
                return
            key = checked_attributes(into, counted, attributes) if attributes else ()
            if running.added is None or not running.added.add(key, number):
                _refuse(into, meter)  # it has ended meanwhile, in another thread
        except Exception as error:
            into.reporter.error("inside", "usage.add() is not counted: %s", type(error).__name__, exc_info=error)

    def __repr__(self) -> str:
        return "tallymark.usage"


def _refuse(into: Runtime, meter: str | None) -> None:
    into.recorder.refuse("usage.add")
    into.reporter.error(
        "inside",
        "usage.add() is not counted: no call with quantity=measure.inside%s is running here; "
        "outside of one, call tallymark.record()",
        "" if meter is None else f" of meter {meter}",
    )


def _find(meter: str | None) -> Running | None:
    running = current_running.get()
    while running is not None:
        inside = running.live and running.added is not None and not running.is_part
        if inside and meter in (None, running.tally.meter.name):
            return running
        running = running.outer
    return None


usage = CurrentUsage()
