"""Whose level it is: what a source stands at is one account's at a time, whatever a file of meters says by when.

A level that a file takes belongs to its source, the sender's stream and the meter. It holds until the source's next.
Where that is billed as something else (the file names another account by now, or other dimensions), the level before
ends at that time: its stream is said to stand at 0 from there on. Nothing that is written changes, so a level that
comes late is put between two others: the one before it ends at its time, and it ends at the time of the one after it.

A source that says that it has ended stands at nothing from that time on; a level of that very time counts instead.

A level that comes late, into time that is billed already, is billed as that time was, as a total is: by the one before
it, or the one after it where it is the first. Unless a person has said whose it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Final, NamedTuple
from uuid import UUID

from tallymark_collector.model import Point, Source, Stream
from tallymark_collector.processors.temporality import in_factor

MICROSECOND: Final = 1000
"""In nanoseconds: what a database tells times apart by."""
LONGEST_HELD: Final = 31 * 86_400 * 10**9
"""Nanoseconds for which a level holds at the most, whatever a plan says (`billing.fields.MAX_STALE`)."""


class Told(NamedTuple):
    """What a source stood at from a time on."""

    time_ns: int
    value: Decimal
    factor: Decimal
    """By which what was measured is the value."""
    stream: Stream
    """What it is billed as."""
    ended: bool = False
    """True where it said that it has ended: of what was billed until then."""


class End(NamedTuple):
    """From this time on, a stream's level is billed as another's."""

    time_ns: int
    stream: Stream


@dataclass(slots=True)
class Succession:
    """What a batch of levels adds to one source."""

    told: dict[int, Told] = field(default_factory=dict)
    """New levels, by position."""
    ended: list[Told] = field(default_factory=list)
    """Where it said that it has ended, as is not known yet."""
    ends: list[End] = field(default_factory=list)
    there: dict[int, Decimal] = field(default_factory=dict)
    """What the source stood at at the time of each that is not new, by position and in its own factor."""


def succeed(timeline: list[Told], incoming: Iterable[tuple[int, Point]]) -> Succession:
    """Puts levels of one source, each with its position, where they belong in time, and adds them to `timeline`: the
    levels that are known, ascending, at least from the one before the first to the one after the last incoming one."""
    found = Succession()
    for position, point in sorted(incoming, key=lambda one: one[1].time_ns):
        place = bisect_left(timeline, point.time_ns, key=lambda known: known.time_ns)
        if point.is_end:
            _end(timeline, place, point, found)
            continue
        if place < len(timeline) and timeline[place].time_ns == point.time_ns and timeline[place].ended:
            del timeline[place]
        before = timeline[place - 1] if place else None
        after = timeline[place] if place < len(timeline) else None
        source = source_of(point)
        if after is not None and after.time_ns == point.time_ns:
            found.there[position] = in_factor(after.value, after.factor, source.factor)
            continue
        told = Told(point.time_ns, point.value, source.factor, point.stream)
        if (like := _like(told, before, after, decided=source.decided)) is not None:
            told = Told(told.time_ns, in_factor(told.value, told.factor, like.factor), like.factor, like.stream)
        timeline.insert(place, told)
        found.told[position] = told
        found.ends += _ends([one for one in (before, told, after) if one is not None])
    return found


def _end(timeline: list[Told], place: int, point: Point, found: Succession) -> None:
    """A source has ended: so does whatever the level before is billed as."""
    before = timeline[place - 1] if place else None
    after = timeline[place] if place < len(timeline) else None
    if after is not None and after.time_ns == point.time_ns:
        return
    like = before or after
    factor, stream = (source_of(point).factor, point.stream) if like is None else (like.factor, like.stream)
    ended = Told(point.time_ns, Decimal(0), factor, stream, ended=True)
    timeline.insert(place, ended)
    found.ended.append(ended)


def source_of(level: Point) -> Source:
    """Where a level comes from that a file of meters took."""
    assert level.stream.source is not None, "only levels of sources come here"
    return level.stream.source


def _like(told: Told, before: Told | None, after: Told | None, *, decided: bool) -> Told | None:
    """The one that a level is billed as; None where it is billed as its file says."""
    for one in (before, after):
        # To a database it is the same time, at which one has it.
        if one is not None and one.time_ns // MICROSECOND == told.time_ns // MICROSECOND:
            return one
    if after is None or decided:
        return None
    return after if before is None else before


def _ends(told: Sequence[Told]) -> Iterable[End]:
    for one, following in pairwise(told):
        held = following.time_ns - one.time_ns
        # One that no plan lets hold for so long ends by itself: no row in a time that its account has no part in.
        if not one.ended and _billed_as(one) != _billed_as(following) and held < LONGEST_HELD:
            yield End(following.time_ns, one.stream)


def _billed_as(told: Told) -> tuple[str, UUID, UUID]:
    return told.stream.series.account, told.stream.id, told.stream.series.id
