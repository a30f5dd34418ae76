"""Control totals: what a producer has recorded since it began, by meter, so that a receiver can prove that it has all.

A segment names the totals from before its interval (its base). Base and sums give the totals at the interval's end, so
whoever converts a segment, its owner or an heir, comes to the same ones.

A run is what one process counts from 0: a process has one, unless its clock is set back. Totals only grow with time, so
from then on they count from 0 again, in a run of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tallymark import quantities
from tallymark.quantities import INT64_MAX, Exact
from tallymark.recorder import totals_by_body
from tallymark.segment import Contents
from tallymark.streams import Described
from tallymark.streams import decode as decode_stream
from tallymark.yielding import restful

SET_BACK_NS: Final = 1_000
"""Length that an interval is given whose beginning the clock took back."""

MAX_METERS: Final = 1_000
"""Meters whose totals one record of a segment holds; their names and units stay below `segment.MAX_BODY`."""

STREAMS_BETWEEN_RESTS: Final = 64

MeterUnit = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of one run. Times in Unix nanoseconds."""

    since_ns: int
    """When the run began."""
    as_of_ns: int
    """The end of the last interval that is in `amounts`; `since_ns` before the first."""
    amounts: Mapping[MeterUnit, Exact] = field(default_factory=dict)
    """By (meter, unit), evidence not among them."""

    @classmethod
    def zero(cls, start_ns: int) -> Totals:
        """Those of a process that has recorded nothing yet."""
        return cls(start_ns, start_ns)

    @property
    def any(self) -> bool:
        """True if an interval is in them."""
        return self.as_of_ns > self.since_ns


def interval(contents: Contents, parts: int) -> tuple[int, int]:
    """(start, end) of a segment's points, when `parts` of them follow each other a nanosecond apart."""
    if contents.end_ns < contents.start_ns:
        # The clock has been set back: the beginning was in the future, the end is right.
        return contents.end_ns - SET_BACK_NS, contents.end_ns
    return contents.start_ns, max(contents.end_ns, contents.start_ns + parts)


class Growth:
    """What one interval adds to the totals."""

    def __init__(self) -> None:
        self.amounts: dict[MeterUnit, Exact] = {}
        self.parts = 0
        """Values on the wire of the stream that has most; 0 where nothing was recorded."""

    @classmethod
    def of(cls, contents: Contents) -> Growth:
        """That of a segment. Raises ValueError for records that Tallymark did not write."""
        growth = cls()
        for body, amount in restful(totals_by_body(contents).items(), STREAMS_BETWEEN_RESTS):
            growth.add(decode_stream(body), amount, _parts(amount))
        return growth

    def add(self, stream: Described, amount: Exact, parts: int) -> None:
        """One more stream."""
        self.parts = max(self.parts, parts)
        if not stream.evidence:
            key = (stream.meter, stream.unit)
            self.amounts[key] = quantities.add(self.amounts.get(key, 0), amount)


def after(base: Totals, contents: Contents, growth: Growth | None = None) -> Totals:
    """The totals at the end of a segment's interval. `growth` is the segment's, where it is known already."""
    if growth is None:
        growth = Growth.of(contents)
    if not growth.parts:
        return base
    start_ns, end_ns = interval(contents, growth.parts)
    if end_ns <= base.as_of_ns:
        base = Totals.zero(start_ns)
    amounts = dict(base.amounts)
    for key, amount in growth.amounts.items():
        amounts[key] = quantities.add(amounts.get(key, 0), amount)
    return Totals(base.since_ns, end_ns, amounts)


def _parts(total: Exact) -> int:
    return 1 if type(total) is int and total <= INT64_MAX else len(quantities.wire_parts(total))


def encode(totals: Totals) -> Iterator[bytes]:
    """The bodies of the records that say what a segment begins with."""
    items = sorted(totals.amounts.items())
    chunks = [items[at : at + MAX_METERS] for at in range(0, len(items), MAX_METERS)] or [[]]
    for number, chunk in enumerate(chunks):
        fields = [
            totals.since_ns,
            totals.as_of_ns,
            number,
            len(chunks),
            [[meter, unit, quantities.text(amount)] for (meter, unit), amount in chunk],
        ]
        yield json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def decode(bodies: Sequence[bytes]) -> Totals | None:
    """The inverse of `encode`; None where records are missing. Again written ones do no harm. Raises ValueError."""
    found: dict[int, list[tuple[str, str, str]]] = {}
    since_ns = as_of_ns = count = 0
    for body in bodies:
        since_ns, as_of_ns, number, count, amounts = json.loads(body)
        found[number] = amounts
    if not count or len(found) < count:
        return None
    return Totals(
        since_ns,
        as_of_ns,
        {(meter, unit): quantities.of_text(text) for chunk in found.values() for meter, unit, text in chunk},
    )
