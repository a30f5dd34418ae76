"""A request cut in parts, for a next hop that takes none of its size.

Both halves of one are requests of the same signal with the same resource, scope and metric around what they hold.
Nothing is decoded and nothing written anew but lengths: points, spans and records stay the bytes that came, in their
order, and so do fields that nobody here knows.
"""

from __future__ import annotations

import sys
from typing import Final, NamedTuple, TypeAlias

from tallymark import conventions
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.wire.fields import DELIMITED, Field, fields, head_of

MAX_REPEATED: Final = 64 * 1024 * 1024
"""Bytes that cutting may add to one request: each part has its resource, scope and metric again. What it takes more for
is a request of which not even the attributes of its resource are taken."""

_Pieces: TypeAlias = "list[memoryview | bytes]"


class _Level(NamedTuple):
    """One step from a message to what it holds."""

    numbers: tuple[int, ...]
    """Of the fields that lead on."""
    repeated: bool = True


_NAME: Final = 1
"""The field's number in Metric."""
_DATA: Final = _Level((5, 7, 9, 10, 11), repeated=False)
"""A metric's gauge, sum, histogram, exponential histogram or summary."""
_PATHS: Final = {
    "metrics": (_Level((1,)), _Level((2,)), _Level((2,)), _DATA, _Level((1,))),
    "traces": (_Level((1,)), _Level((2,)), _Level((2,))),
    "logs": (_Level((1,)), _Level((2,)), _Level((2,))),
}


class Parts:
    """A request on its way, in as many parts as the next hop wants, in their order."""

    def __init__(self, signal: str, body: bytes) -> None:
        self._signal = signal
        self._left = [body]
        """The last one is next."""
        self._repeated = 0
        self._refused = sys.maxsize
        """Bytes of the smallest part that was too large."""

    @property
    def next(self) -> bytes | None:
        """The part that is to be sent; None after the last."""
        return self._left[-1] if self._left else None

    @property
    def is_too_large(self) -> bool:
        """Whether a part was refused that is no larger than the next one."""
        return len(self._left[-1]) >= self._refused

    def done(self) -> None:
        """The next part was taken, or given up."""
        self._left.pop()

    def split(self) -> bool:
        """Cuts the next part, which is too large, in two; False where that cannot be done."""
        self._refused = min(self._refused, len(self._left[-1]))
        found = halves(self._signal, self._left[-1])
        if found is None:
            return False
        self._repeated += sum(map(len, found)) - len(self._left[-1])
        if self._repeated > MAX_REPEATED:
            return False
        self._left[-1:] = reversed(found)
        return True


def halves(signal: str, body: bytes) -> tuple[bytes, bytes] | None:
    """The first and the second half of a request; None where it holds one thing alone, or nothing."""
    try:
        found = _halves(memoryview(body), _PATHS[signal])
    except MalformedRequest:  # groups, which OTLP has none of
        return None
    return None if found is None else (b"".join(found[0]), b"".join(found[1]))


def _halves(message: memoryview, path: tuple[_Level, ...]) -> tuple[_Pieces, _Pieces] | None:
    level, *deeper = path
    if level is _DATA and _is_control_total(message):
        return None
    count, last = 0, None
    for field in fields(message):
        if _leads_on(field, level):
            count, last = count + 1, field
    if count > 1:
        return _cut(message, level, count // 2) if level.repeated else None
    if last is None or not deeper:
        return None
    inside = _halves(message[last.value : last.end], tuple(deeper))
    if inside is None:
        return None
    before, after = message[: last.begin], message[last.end :]
    first, second = ([before, head_of(last.number, sum(map(len, half))), *half, after] for half in inside)
    return first, second


def _cut(message: memoryview, level: _Level, middle: int) -> tuple[_Pieces, _Pieces]:
    """The message with the things before the middle one, and with the others; with all the rest both."""
    first: _Pieces = []
    second: _Pieces = []
    both, before, after = [first, second], [first], [second]
    seen, begin, into = 0, 0, both
    for field in fields(message):
        here = both
        if _leads_on(field, level):
            here = before if seen < middle else after
            seen += 1
        if here is not into:
            for half in into:
                half.append(message[begin : field.begin])
            begin, into = field.begin, here
    for half in into:
        half.append(message[begin:])
    return first, second


def _leads_on(field: Field, level: _Level) -> bool:
    return field.kind == DELIMITED and field.number in level.numbers


def _is_control_total(metric: memoryview) -> bool:
    """Whether its points may be parts of one total: the next hop refuses some without the others."""
    names = [field for field in fields(metric) if field.number == _NAME and field.kind == DELIMITED]
    return bool(names) and metric[names[-1].value : names[-1].end] == conventions.CONTROL_TOTAL.encode()
