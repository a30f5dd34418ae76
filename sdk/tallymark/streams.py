"""What a sum belongs to, in the process and in a segment's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from tallymark import conventions
from tallymark.dimensions import Dimensions, Value
from tallymark.meters import Meter

MAX_SERIES: Final = 100_000
"""Series that are kept ready for `record()`; what a decorator counts keeps its own."""

MAX_DESCRIBED: Final = 1_000
"""What is kept ready of how calls describe themselves to `record()`: their methods and routes are few."""


class Series:
    """A meter with its dimensions.

    Compared and hashed by identity, for it is part of the key that every recorded call looks up. Two objects of the
    same content are two sums of one stream, which are added when they leave the process.

    With `evidence` its sums are no usage: they say how much of the meter's usage is on spans.
    """

    __slots__ = ("dimensions", "evidence", "meter")

    def __init__(self, meter: Meter, dimensions: Dimensions, evidence: bool = False) -> None:
        self.meter = meter
        self.dimensions = dimensions
        self.evidence = evidence

    def __repr__(self) -> str:
        return f"Series({self.meter.name!r}, {self.dimensions!r})"


Stream = tuple[Series, str | None, str | None]
"""(series, account, plan)"""


class SeriesCache:
    """The series of a process, one object for each content. No lock: two threads can at worst make two objects."""

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self._known: dict[tuple[Meter, Dimensions], Series] = {}
        self._max = max_series
        self._described: dict[tuple[object, ...], Dimensions] = {}

    def of(self, meter: Meter, dimensions: Dimensions) -> Series:
        """The series of a meter and its dimensions, which must be ordered as `tallymark.dimensions` does it."""
        key = (meter, dimensions)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= self._max:
                self._known.clear()
            found = self._known[key] = Series(meter, dimensions)
        return found

    def described(self, key: tuple[object, ...]) -> Dimensions | None:
        """What was kept by `keep_described`."""
        return self._described.get(key)

    def keep_described(self, key: tuple[object, ...], dimensions: Dimensions) -> None:
        """Keeps what a call says of itself, checked, by what it was made from."""
        if len(self._described) >= MAX_DESCRIBED:
            self._described.clear()
        self._described[key] = dimensions


class Described(NamedTuple):
    """A stream by its content, as it is read from a segment."""

    meter: str
    unit: str
    account: str | None
    plan: str | None
    dimensions: Dimensions
    evidence: bool = False


def encode(stream: Stream) -> bytes:
    """A stream as a record's body: the same bytes for the same content."""
    series, account, plan = stream
    fields = [series.meter.name, series.meter.unit, account, plan, series.dimensions, *([1] if series.evidence else [])]
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def decode(body: bytes) -> Described:
    """The inverse of `encode`. Raises ValueError for what it did not write."""
    meter, unit, account, plan, dimensions, *evidence = json.loads(body)
    return Described(
        meter, unit, account, plan, tuple((name, kind, value) for name, kind, value in dimensions), evidence == [1]
    )


def attributes_of(stream: Described) -> Mapping[str, Value]:
    """A stream's attributes as they go on the wire, without those that are not known."""
    attributes: dict[str, Value] = {}
    if stream.account is not None:
        attributes[conventions.ACCOUNT] = stream.account
    if stream.plan is not None:
        attributes[conventions.PLAN] = stream.plan
    for name, _, value in stream.dimensions:
        attributes[name] = value
    return attributes
