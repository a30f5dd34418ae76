"""What has to hold of what comes out of the decoder, whatever went into it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Final

from tallymark import conventions
from tallymark_collector.model import Evidence, Point, Stream, Temporality, attributes_json, fingerprint
from tallymark_collector.processors import validation
from tallymark_collector.processors.decoding import Decoded
from tests.delivery.fuzz.corpus import NOW

LIMITS: Final = validation.TimeLimits()


class Broken(AssertionError):  # noqa: N818 - a promise
    """Something that must never be."""


def hold(condition: object, what: str, *particulars: object) -> None:
    """Raises Broken where the condition does not hold."""
    if not condition:
        raise Broken(": ".join([what, *(repr(one)[:400] for one in particulars)]))


def same(one: Decoded, other: Decoded) -> bool:
    """Whether two readings come to the same, streams compared by what they are."""
    return (
        len(one.points) == len(other.points)
        and all(map(_same_point, one.points, other.points))
        and one.quarantined == other.quarantined
        and one.controls == other.controls
        and one.closings == other.closings
        and one.counts == other.counts
        and (one.rejected, one.unmatched) == (other.rejected, other.unmatched)
    )


def _same_point(one: Point, other: Point) -> bool:
    if one[1:] != other[1:]:
        return False
    first, second = one.stream, other.stream
    if first is second:
        return True
    return (
        (first.id, first.series.id, first.temporality) == (second.id, second.series.id, second.temporality)
        and first.scope_name == second.scope_name
        # A NaN among the attributes is not equal to itself.
        and (first.resource == second.resource or fingerprint(first.resource) == fingerprint(second.resource))
    )


def check_point(point: Point) -> None:
    """What the store relies on."""
    stream, start_ns, time_ns, value, *_ = point
    _check_quantity(abs(value) if stream.temporality is Temporality.LEVEL else value)
    _check_times(start_ns, time_ns)


def check_stream(stream: Stream) -> None:
    """Likewise, of what its points share."""
    series = stream.series
    _check_text("account", series.account, validation.MAX_ACCOUNT_LENGTH)
    _check_text("meter", series.meter, validation.MAX_METER_LENGTH)
    hold("\0" not in series.unit and len(series.unit) <= validation.MAX_UNIT_LENGTH, "unit", series.unit)
    for attributes in (series.attributes, stream.resource):
        text = attributes_json(attributes)
        hold("\\u0000" not in text, "NUL in what becomes jsonb", text)
        json.loads(text, parse_constant=_no_constant)


def check_evidence(item: Evidence) -> None:
    """Likewise."""
    hold(item.quantity >= 0 and item.quantity.is_finite(), "quantity", item.quantity)
    _check_times(item.start_ns, item.time_ns)
    _check_text("account", item.account, validation.MAX_ACCOUNT_LENGTH)
    _check_text("meter", item.meter, validation.MAX_METER_LENGTH)
    for text in (item.name, item.service, item.user or ""):
        hold("\0" not in text, "NUL", text)
        text.encode()
    json.loads(attributes_json(item.attributes), parse_constant=_no_constant)


def _check_quantity(value: Decimal) -> None:
    hold(type(value) is Decimal and value.is_finite() and value >= 0, "quantity", value)
    exponent = value.as_tuple().exponent
    hold(value < 10**validation.MAX_WHOLE_DIGITS, "digits before the point", value)
    hold(isinstance(exponent, int) and exponent >= -conventions.MAX_DECIMALS, "digits behind the point", value)


def _check_times(start_ns: int, time_ns: int) -> None:
    oldest, latest = LIMITS.window(NOW)
    hold(0 <= start_ns <= time_ns and oldest <= time_ns <= latest, "times", start_ns, time_ns)


def _check_text(what: str, text: str, most: int) -> None:
    hold(type(text) is str and 0 < len(text) <= most and "\0" not in text, what, text)
    text.encode()


def _no_constant(name: str) -> None:
    raise Broken(f"{name} is no JSON")
