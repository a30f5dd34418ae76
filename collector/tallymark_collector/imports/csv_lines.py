"""Lines to the records of CSV: quotes may hold line ends.

Only a quote that begins a field opens one: `5" pipe` is text like any other. Where a record of several lines turns out
to be none, its first line had a stray quote: that line is rejected alone, and those behind it are read again without
it, so that a quote costs a line and no more. Where it is one, but of lines that could be lines themselves, two stray
quotes may have met: nobody but a person can tell, so each of them is rejected.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final

from tallymark_collector.imports.lines import MAX_LINE, Input, Record, lines

DEFAULT_DELIMITER: Final = ","

MAX_RECORD_LINES: Final = 1000
"""Lines of one record; its bytes are bounded by `MAX_LINE` too."""

NEVER_CLOSED: Final = "a quote is opened and never closed"
_CLOSED_WRONGLY: Final = "a quote opens a field and is closed wrongly"


class _State(Enum):
    WHOLE = "every field is closed"
    OPEN = "the last field is between quotes, and goes on in the next line"
    BROKEN = "a closing quote stands neither before a delimiter nor at the end"


def csv_records(
    source: Input,
    *,
    final: bool,
    delimiter: str = DEFAULT_DELIMITER,
    columns: int | None = None,
    alone: Callable[[Record], bool] = lambda _: False,
) -> Iterator[Record]:
    """The records, of as many fields as `columns` says, or as the first one has; `alone` knows a line that may be one.

    At the end of an input that is not `final` an open quote may still be closed: all since then is a record, not ended.
    """
    separator = delimiter.encode()
    incoming = lines(source)
    waiting: list[Record] = []
    again: list[Record] = []
    state, size = _State.WHOLE, 0
    while True:
        line = again.pop() if again else next(incoming, None)
        if line is None:
            if not waiting:
                return
            if not final:
                yield _joined(waiting)._replace(ended=False)
                return
            fault: str | None = NEVER_CLOSED
        elif waiting and not line.ended and not final:
            # It is still being written: what it lacks may come.
            yield _joined([*waiting, line])._replace(ended=False)
            return
        else:
            waiting.append(line)
            size += line.size
            state = _after(line, separator, inside=state is _State.OPEN)
            if state is not _State.OPEN or line.fault is not None:
                fault = _wrong(waiting, state, delimiter, columns)
            elif len(waiting) >= MAX_RECORD_LINES or size > MAX_LINE:
                fault = NEVER_CLOSED
            else:
                continue
        if fault:
            yield waiting[0]._replace(fault=fault)
            again.extend(reversed(waiting[1:]))
        elif len(waiting) > 1 and all(map(alone, waiting)):
            yield from _doubted(waiting)
        else:
            record = _joined(waiting)
            if columns is None and record.content.strip():
                columns = _fields(record, delimiter)
            yield record
        waiting, state, size = [], _State.WHOLE, 0


def _after(line: Record, separator: bytes, *, inside: bool) -> _State:
    """How the record stands at the line's end; `inside`: it begins between quotes."""
    content, place = line.content, 0
    if not inside:
        if not content.startswith(b'"'):
            place = content.find(separator + b'"')
            if place < 0:
                return _State.WHOLE
            place += 1
        place += 1
    while True:
        place = content.find(b'"', place) + 1
        if not place:
            return _State.OPEN
        following = content[place : place + 1]
        if following == b'"':
            place += 1
        elif not following:
            return _State.WHOLE
        elif following != separator:
            return _State.BROKEN
        else:
            # The next field that a quote begins; those between have nothing that ends a line's record.
            place = content.find(separator + b'"', place) + 2
            if place < 2:
                return _State.WHOLE


def _wrong(waiting: list[Record], state: _State, delimiter: str, columns: int | None) -> str | None:
    """Why several lines are no record after all. What is wrong with a single one, whoever reads its fields says."""
    last = waiting[-1]
    if len(waiting) == 1:
        return last.fault
    if last.fault is not None:
        return f"{_CLOSED_WRONGLY}: line {last.number} is too long to belong to it"
    if state is _State.BROKEN:
        return f"{_CLOSED_WRONGLY}: in line {last.number}, neither before a delimiter nor at the end"
    found = _fields(_joined(waiting), delimiter)
    if columns is not None and found != columns:
        return f"{_CLOSED_WRONGLY}: with line {last.number} it has {found} fields instead of {columns}"
    return None


def _doubted(waiting: list[Record]) -> Iterator[Record]:
    first, last = waiting[0].number, waiting[-1].number
    for each in waiting:
        yield each._replace(
            fault=f"a quote opens a field, and what it holds reads as lines of their own: from line {first} to line"
            f" {last}. Where the quotes of these two are stray, take them out; where not, make it one `text`"
        )


def _fields(record: Record, delimiter: str) -> int | None:
    """How many fields it has; None where it is no CSV."""
    try:
        return len(next(csv.reader([record.content.decode("latin-1")], delimiter=delimiter, strict=True), ()))
    except csv.Error:
        return None


def _joined(several: list[Record]) -> Record:
    first = several[0]
    if len(several) == 1:
        return first
    content = b"\n".join(each.content for each in several)
    seen = b"".join(each.seen for each in several)
    return Record(first.number, len(several), sum(e.size for e in several), content, seen, several[-1].ended)
