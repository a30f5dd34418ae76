"""One recording: identity, dimensions and quantity to the recorder, then the same to the current span."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.calls import Call, current_call
from tallymark.dimensions import Dimensions, Value, from_mapping, joined, of_call
from tallymark.errors import DeclarationError
from tallymark.identity import current_identity
from tallymark.meters import Meter
from tallymark.quantities import Exact, RefusedQuantityError, exact
from tallymark.streams import Series


def record(
    meter: str,
    quantity: int | float | Decimal = 1,
    *,
    unit: str | None = None,
    attributes: Mapping[str, Value] | None = None,
) -> None:
    """Record usage where there is no handler to decorate, for the account that `identify()` named.

    `unit` may be left out: it is the declared meter's, else "1". Inside an HTTP request the method and the route are
    recorded with it. Never raises: what cannot be counted is refused with a warning on the logger `tallymark`.
    """
    into = runtime.current()
    if not into.enabled:
        return
    try:
        known = into.meters.at_call(meter, unit)
    except DeclarationError as error:
        into.reporter.error("meter", "usage is not recorded: %s", error)
        return
    except Exception as error:
        into.reporter.error("record", "usage is not recorded: %s", type(error).__name__, exc_info=error)
        return
    call = current_call.get()
    dimensions = checked_attributes(into, known, attributes) if attributes else ()
    try:
        if call is not None:
            dimensions = joined(_of_running(into, known, call), dimensions)
    except Exception as error:
        into.reporter.error("call", "the request could not be described: %s", type(error).__name__, exc_info=error)
    count(into, into.series.of(known, dimensions), quantity)


def count(into: Runtime, series: Series, quantity: object) -> None:
    """Record one quantity. Never raises."""
    meter = series.meter
    try:
        try:
            number: Exact = quantity if type(quantity) is int and 0 <= quantity < 2**63 else exact(quantity)
        except RefusedQuantityError as error:
            into.recorder.refuse(meter.name)
            into.reporter.warning(
                f"refused.{meter.name}", "a quantity of meter %s is refused and not billed: %s", meter.name, error
            )
            return
        identity = current_identity()
        if number:
            into.recorder.add((series, identity.account, identity.plan), number)
    except Exception as error:
        into.reporter.error(
            "count", "usage of meter %s is not recorded: %s", meter.name, type(error).__name__, exc_info=error
        )
        return
    try:
        into.evidence.add_to_current_span(meter, identity, number)
    except Exception as error:
        into.reporter.error("span", "a span could not be given its usage: %s", type(error).__name__, exc_info=error)


def checked_attributes(into: Runtime, meter: Meter, attributes: object) -> Dimensions:
    """Attributes made at call time: those that can be sent. Never raises; the usage counts without the others."""
    try:
        if not isinstance(attributes, Mapping):
            into.reporter.warning(
                f"attributes.{meter.name}",
                "usage of meter %s is recorded without its attributes: a %s is no mapping",
                meter.name,
                type(attributes).__name__,
            )
            return ()
        dimensions, problems = from_mapping(attributes)
        _tell(into, meter, problems)
    except Exception as error:
        into.reporter.error(
            f"attributes.{meter.name}",
            "usage of meter %s is recorded without its attributes: %s",
            meter.name,
            type(error).__name__,
            exc_info=error,
        )
        return ()
    return dimensions


def _of_running(into: Runtime, meter: Meter, call: Call) -> Dimensions:
    """What a call says of itself while it runs."""
    description = call.describe_running()
    key = (call.attributes_of, description)
    try:
        found = into.series.described(key)
    except Exception:  # what tells the route may give anything, also what has no hash
        found = None
    if found is None:
        found, is_whole = dimensions_of(into, meter, call.attributes_of(description))
        if is_whole:
            into.series.keep_described(key, found)
    return found


def dimensions_of(
    into: Runtime, meter: Meter, attributes: Mapping[str, object], own: Dimensions = ()
) -> tuple[Dimensions, bool]:
    """What a call says of itself, under the meter's own attributes, and whether all of it can be sent: the usage counts
    without the rest."""
    dimensions, problems = of_call(attributes, own)
    _tell(into, meter, problems)
    return dimensions, not problems


def _tell(into: Runtime, meter: Meter, problems: list[str]) -> None:
    for problem in problems:
        into.reporter.warning(
            f"attributes.{meter.name}", "usage of meter %s is recorded without an attribute: %s", meter.name, problem
        )
