"""Cumulative totals become increases, append-only, whatever order they arrive in.

A cumulative stream is a function of time that its producer sampled. What is billed for (a, b] is the increase
between the samples at a and b. When a late sample x arrives between them, (a, b] has been written already; it is
not touched: the increase over (a, x] is added, and a correction over (x, b] takes the same amount away again. So rows
are never changed, any past answer can be reproduced, and the total between a and b stays what it was.

Epochs. Samples with one start_time belong together and can only grow; a new start_time is a new epoch that begins at
0. `start_time == time` (OTLP: start unknown) makes that first sample a base that counts nothing, unless OpenTelemetry's
SDK for JavaScript says it: that knows its start, by a clock of milliseconds, and what a job records and exports at once
begins when it ends. A start_time of 0
means the producer never said: samples then form one epoch, the first counts nothing, and a fall is a reset that
counts from 0 again, as Prometheus reads its counters.

Totals that a file of meters takes know how the increase that ends in each of them is billed (`Billing`): to whom, by
which factor, and since when. What is counted between two of them depends on the two alone; and a total that comes late,
into time that is billed already, is billed as that time was, whatever the file says by now.
"""

from __future__ import annotations

import decimal
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from tallymark_collector.model import Point, Reason, Refusal, Stream, cause

ZERO = Decimal(0)
# Python's own 28 digits would round the increase between a large total and a small fraction, and the sum of the
# increases would not be the total any more. What `validation` lets through has 55 digits.
_EXACT: Final = decimal.Context(prec=100, traps=[decimal.Inexact, decimal.InvalidOperation])

# A measured total times another factor has as many digits as both together, and is exact again once it is divided.
_RATIO: Final = decimal.Context(prec=1000, traps=[decimal.Inexact, decimal.InvalidOperation])

SDK_LANGUAGE: Final = "telemetry.sdk.language"
COARSE_CLOCKS: Final = ("nodejs", "webjs")
"""Languages whose SDK takes a point's times from a clock of milliseconds."""


class Billing(NamedTuple):
    """How the increase that ends in a total is billed, by a file of meters."""

    stream: Stream | None
    """What it is billed as; None where it was billed by other means, so that the total is a base and no more."""
    factor: Decimal
    since_ns: int


class Sample(NamedTuple):
    """A cumulative stream's total at a time."""

    time_ns: int
    value: Decimal
    billing: Billing | None = None
    """None for a stream that needs no file: it is its own."""


@dataclass(slots=True)
class Increases:
    """What a batch of samples adds to one epoch of one stream."""

    samples: list[Sample] = field(default_factory=list)
    """New samples, to be remembered."""
    points: list[Point] = field(default_factory=list)
    """Increases and corrections, to be billed; a correction's value is negative."""
    duplicates: int = 0
    refused: list[tuple[Point, Refusal]] = field(default_factory=list)


def increases(start_ns: int, known: Sequence[Sample], incoming: Iterable[Point]) -> Increases:
    """Splits totals of one epoch of one stream into increases.

    `known`: the samples in the store, ascending, at least those between the neighbours of the incoming ones
    (the neighbours included). `incoming`: points of that epoch in any order.
    """
    result = Increases()
    timeline = list(known)
    for point in sorted(incoming, key=lambda point: point.time_ns):
        _add(start_ns, timeline, point, result)
    return result


def _add(start_ns: int, timeline: list[Sample], point: Point, result: Increases) -> None:
    position = bisect_left(timeline, point.time_ns, key=lambda known: known.time_ns)
    before = timeline[position - 1] if position else None
    after = timeline[position] if position < len(timeline) else None
    sample = _sample(point, after)
    if after is not None and after.time_ns == sample.time_ns:
        if after.value == sample.value:
            result.duplicates += 1
        else:
            detail = f"the total at this time was {after.value} before and is {sample.value} now"
            result.refused.append((point, Refusal(Reason.VALUE_CONFLICT, detail)))
        return
    if start_ns and (problem := _falls(before, sample) or _falls(sample, after)):
        result.refused.append((point, problem))
        return
    timeline.insert(position, sample)
    result.samples.append(sample)
    base_ns = 0 if _knows_its_start(point.stream) else start_ns
    increase = _increase(start_ns, base_ns, before, sample)
    if increase:
        begin = before.time_ns if before is not None else start_ns
        own = cause(start_ns, sample.time_ns, "increase")
        result.points.append(Point(_billed_as(sample, point), begin, sample.time_ns, increase, own))
    if after is not None:
        more, less = (_increase(start_ns, base_ns, one, after) for one in (sample, before))
        correction = _EXACT.subtract(more, less)
        if correction:
            own = cause(start_ns, sample.time_ns, "correction")
            result.points.append(Point(_billed_as(after, point), sample.time_ns, after.time_ns, correction, own))


def _sample(point: Point, after: Sample | None) -> Sample:
    source = point.stream.source
    if source is None:
        return Sample(point.time_ns, point.value)
    own = Sample(point.time_ns, point.value, Billing(point.stream, source.factor, source.since_ns))
    if after is None or after.billing is None:
        return own
    return Sample(point.time_ns, _in_factor_of(own, after.billing), after.billing)


def _billed_as(sample: Sample, point: Point) -> Stream:
    stream = None if sample.billing is None else sample.billing.stream
    return point.stream if stream is None else stream


def _in_factor_of(sample: Sample, other: Billing | None) -> Decimal:
    """The sample's value as it would be with another factor."""
    if other is None or sample.billing is None or sample.billing.factor == other.factor:
        return sample.value
    if sample.billing.stream is None:
        return sample.value  # by which factor an earlier version had multiplied it, it did not say
    return in_factor(sample.value, sample.billing.factor, other.factor)


def in_factor(value: Decimal, factor: Decimal, other: Decimal) -> Decimal:
    """What was measured times `factor`, times `other`: exact, since what was measured is a decimal."""
    return value if factor == other else _RATIO.divide(_RATIO.multiply(value, other), factor)


def _knows_its_start(stream: Stream) -> bool:
    return stream.resource.get(SDK_LANGUAGE) in COARSE_CLOCKS


def _increase(start_ns: int, base_ns: int, before: Sample | None, sample: Sample) -> Decimal:
    """`base_ns`: when a first total is a base."""
    if sample.billing is not None and not _counts(start_ns, before, sample, sample.billing):
        return ZERO
    if before is None:
        return ZERO if not start_ns or sample.time_ns == base_ns else sample.value
    earlier = _in_factor_of(before, sample.billing)
    if start_ns == 0 and sample.value < earlier:
        return sample.value
    return _EXACT.subtract(sample.value, earlier)


def _counts(start_ns: int, before: Sample | None, sample: Sample, billing: Billing) -> bool:
    """False where the file bills nothing of the time before a total, or nobody knows how much of it."""
    since = billing.since_ns
    if billing.stream is None or sample.time_ns <= since:
        return False
    if before is None:
        return start_ns >= since
    # A total from before `since` is where counting begins if it was kept for that: of one that was kept by another
    # rule, nobody knows how long before `since` it was the last.
    return before.time_ns > since or (before.billing is not None and before.billing.since_ns == since)


def _falls(before: Sample | None, after: Sample | None) -> Refusal | None:
    if before is None or after is None or _in_factor_of(before, after.billing) <= after.value:
        return None
    detail = (
        f"a total of {before.value} at {before.time_ns} ns falls to {after.value} at {after.time_ns} ns in one epoch"
    )
    return Refusal(Reason.VALUE_DECREASED, detail)
