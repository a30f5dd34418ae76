"""What a request keeps in memory while it waits to be written, in bytes, by what it holds; and what of it is written
over and over, which is no memory of ours, and the database's work all the same: each new stream's row has a copy of the
resource and of the scope's name.

The figures are of CPython 3.10 to 3.13 on 64 bits, rounded up: the values themselves, the containers that lead to them
and the row that is made of them. `tests/collector/store/test_weighing.py` measures a flood of each kind and holds the
memory it takes against what was counted. Not counted is what a request shares with others: streams that were written
before by this process, which `processors.streams` remembers anyhow, and the interpreter's small numbers and names.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Final

from tallymark_collector.model import (
    Attributes,
    AttributeValue,
    Batch,
    Evidence,
    Origin,
    Point,
    Stream,
    attributes_json,
)
from tallymark_collector.processors.pace import Pace
from tallymark_collector.store import rows

REQUEST: Final = 4_096
"""A request, whatever it holds: those who wait for its answer."""
POINT: Final = 384
"""A point: a tuple, two times, a quantity, its places in lists; without its row."""
STREAM: Final = 1_536
"""A stream that nobody has written yet, its series and identities; without its attributes."""
ATTRIBUTE: Final = 256
"""An attribute of such a stream, which keeps it as it came and decoded, with and without the account."""
SPAN: Final = 96
"""A span of which a point was made, without its bytes."""
EVIDENCE: Final = 704
EVIDENCE_ATTRIBUTE: Final = 128
QUARANTINED: Final = 512
SAID: Final = 512
"""A control total, or a count of evidence."""
CLOSING: Final = 160

PIECE: Final = 4096
"""Points between two rests."""
COPIES: Final = 1 << 18
"""Characters of resources that are measured between two rests; and streams that share them."""


def of_points(points: Sequence[Point]) -> Generator[None, None, int]:
    """Of points without their rows, and of the streams that they are the first to bring, in pieces (see `resting`).

    To be asked before their rows are made: whoever counts a stream makes the part that all of its rows repeat, and by
    that it is known to be counted. What is written of it counts until it has been.
    """
    new: list[Stream] = []
    unwritten: dict[Stream, None] = {}
    envelopes: dict[int, int] = {}
    size = POINT * len(points)
    for start in range(0, len(points), PIECE):
        if start:
            yield
        piece = points[start : start + PIECE]
        for stream in dict.fromkeys(point.stream for point in piece):
            if stream.row is None:
                new.append(stream)
                rows.stream_row(stream)
            if not stream.written:
                unwritten[stream] = None
        spans = [point.span for point in piece if point.span]
        size += sum(SPAN + len(span) for _, span in spans)
        envelopes |= {id(envelope): len(envelope) for envelope, _ in spans}
    shared = sum(envelopes.values()) + _of_resources([stream.origin for stream in new])
    size += sum(map(_of_stream, new)) + shared
    return size + (yield from _of_copies(unwritten))


def of_others(batch: Batch, lines: Sequence[bytes]) -> int:
    """Of a request: the rows that were made of its points, and all else that its batch holds."""
    size = REQUEST + sum(map(len, lines)) + sum(map(_of_evidence, batch.evidence))
    size += sum(QUARANTINED + len(item.payload) + len(item.refusal.detail) for item in batch.quarantined)
    size += sum(SAID + _of_attributes(item.origin) for item in batch.controls)
    size += sum(SAID + _of_attributes(item.origin) for item in batch.counts)
    return size + CLOSING * len(batch.closings)


def _of_stream(stream: Stream) -> int:
    attributes = stream.origin.attributes
    return STREAM + ATTRIBUTE * len(attributes) + 3 * sum(map(len, attributes))


def _of_copies(streams: Iterable[Stream]) -> Generator[None, None, int]:
    """Of what the rows of new streams repeat."""
    lengths: dict[int, int] = {}
    size = 0
    pace = Pace(COPIES)
    for stream in streams:
        length = lengths.get(id(stream.resource))
        made = 1
        if length is None:
            made = length = lengths[id(stream.resource)] = len(attributes_json(stream.resource))
        size += length + len(stream.scope_name)
        if pace.full(made):
            yield
    return size


def _of_attributes(origin: Origin) -> int:
    return 64 * len(origin.attributes) + 2 * sum(map(len, origin.attributes))


def _of_resources(origins: Sequence[Origin]) -> int:
    """Of what all streams of a resource, or a scope, share."""
    shared = {id(said): len(said) for origin in origins for said in (origin.resource, origin.scope)}
    return 2 * sum(shared.values())


def _of_evidence(item: Evidence) -> int:
    names = len(item.name) + len(item.service) + len(item.user or "")
    return EVIDENCE + names + _of_value(item.attributes)


def _of_value(value: AttributeValue) -> int:
    match value:
        case Attributes():
            return sum(EVIDENCE_ATTRIBUTE + len(key) + _of_value(inner) for key, inner in value)
        case tuple():
            return sum(EVIDENCE_ATTRIBUTE + _of_value(inner) for inner in value)
        case str() | bytes():
            return len(value)
        case _:
            return 0
