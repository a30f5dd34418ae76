"""An input's records as the lines that they bill: what an import and its rehearsal have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import UUID

from tallymark_collector.errors import UserError
from tallymark_collector.imports import formats, rejects, times
from tallymark_collector.imports.csv_lines import DEFAULT_DELIMITER, csv_records
from tallymark_collector.imports.extraction import Extraction, Line
from tallymark_collector.imports.faults import LineFault, LineSkipped
from tallymark_collector.imports.identity import Occurrences, key_of_id
from tallymark_collector.imports.lines import Input, Record, lines
from tallymark_collector.imports.mapping import Mapping
from tallymark_collector.imports.rejects import Origin
from tallymark_collector.imports.summary import Unclosed


class Found(NamedTuple):
    """What a record is: a line that bills, or a fault, or neither."""

    key: UUID
    line: Line | None = None
    fault: LineFault | None = None
    skipped: bool = False
    fields: formats.Fields | None = None
    """Of a line that bills, for whoever asks what another mapping makes of it."""


class Reading:
    """Reads one input from its beginning. What was read is summed up in `digest`, by which it is known again."""

    def __init__(
        self, source: Input, mapping: Mapping, *, final: bool = True, of_rejects: Origin | None = None
    ) -> None:
        """`final`: a last line without its end is whole. `of_rejects`: the input is a reject file of that origin."""
        self._input = source
        self._mapping = mapping
        self._final = final or source.finished
        self._of_rejects = of_rejects is not None
        self._origin = of_rejects
        assert mapping.time is not None, "a completed mapping"
        self._time = times.reader(mapping.time.format, mapping.time.time_zone)
        self._hasher = hashlib.blake2b(digest_size=16)
        self._occurrences = Occurrences()
        self._needs_header = mapping.format == "csv" and mapping.columns is None and not of_rejects
        self._dialect = formats.Dialect(mapping.delimiter or DEFAULT_DELIMITER, quotes=mapping.quote == "double")
        self.columns = mapping.columns
        self.bytes = 0
        self.lines = 0
        self.left = 0
        """Lines at the end that wait for the next import."""
        self.unclosed: Unclosed | None = None
        """Why whole lines are among those."""
        self.reader = None if mapping.format == "csv" else formats.READERS[mapping.format]
        if self.columns is not None:
            self.reader = formats.csv_row(self.columns, self._dialect)

    def digest(self) -> bytes:
        """Over everything read so far."""
        return self._hasher.digest()

    def records(self) -> Iterator[tuple[Record, UUID]]:
        """Every record and what tells it from the others, blank ones and the header aside: they are read, no more.

        A last record without its end is not read, but for `final`: its lines are `left`. Raises UserError.
        """
        for record in _records(self._input, self._mapping, self._of_rejects, self._final, self._alone):
            if not record.ended and not self._final:
                self.left = record.lines
                if whole := record.lines - (not record.seen.endswith(b"\n")):
                    self.unclosed = Unclosed(self._input.name, record.number, whole)
                return
            self._hasher.update(record.seen)
            self.bytes += record.size
            self.lines += record.lines
            if not record.content.strip() and record.fault is None:
                continue
            if self._needs_header:
                self._take_header(record)
                continue
            yield record, self._occurrences.key(record.content)

    def read(self, record: Record, key: UUID, extraction: Extraction) -> Found:
        """What a record is."""
        try:
            key, text, reader = self._text(record, key)
            fields = reader(text)
            line = extraction.line(fields)
        except LineSkipped:
            return Found(key, skipped=True)
        except LineFault as fault:
            return Found(key, fault=fault)
        return Found(key if line.id is None else key_of_id(line.id), line, fields=fields)

    def _text(self, record: Record, key: UUID) -> tuple[UUID, str, Callable[[str], formats.Fields]]:
        if not self._of_rejects:
            if record.fault is not None:
                raise LineFault(record.fault)
            assert self.reader is not None, "the header comes first"
            return key, formats.text_of(record.content), self.reader
        reject = rejects.read(record)
        assert self._origin is not None, "it is a reject file"
        if other := self._origin.mismatch(reject.origin):
            raise LineFault(f"it was rejected of the {other[0]} {other[1]!r}: import it under that --{other[0]}")
        reader = self.reader
        if self._mapping.format == "csv" and reject.columns is not None:
            reader = formats.csv_row(reject.columns, self._dialect)
        if reader is None:
            raise LineFault("it has no `columns`: keep those of the reject file")
        return reject.id, reject.text, reader

    def _alone(self, record: Record) -> bool:
        """Whether a line could be one by itself: its quotes aside, it has the fields and a time."""
        assert self._mapping.time is not None, "a completed mapping"
        if self.columns is None:
            return False
        reader = formats.csv_row(self.columns, self._dialect._replace(quotes=False))
        try:
            time = reader(formats.text_of(record.content))(self._mapping.time.field)
            self._time(time or "")
        except LineFault:
            return False
        return True

    def _take_header(self, record: Record) -> None:
        self._needs_header = False
        try:
            text = formats.text_of(record.content)
        except LineFault as fault:
            raise UserError(f"the header of {self._input.name} cannot be read: {fault}") from None
        if record.fault is not None:
            raise UserError(f"the header of {self._input.name} cannot be read: {record.fault}")
        found = formats.header(text, self._dialect, needed(self._mapping), self._input.name)
        self.columns = tuple(found)
        self.reader = formats.csv_row(found, self._dialect)


def needed(mapping: Mapping) -> Sequence[str]:
    """The fields without which a file as a whole is not what the mapping describes."""
    assert mapping.time is not None, "a completed mapping"
    names = [mapping.time.field, mapping.id, mapping.account.field]
    names += [dimension.field for dimension in (mapping.dimensions or {}).values()]
    for metered in mapping.meters:
        names += [metered.field, *(dimension.field for dimension in metered.dimensions.values())]
    names += [each.field for each in mapping.filters]
    names += [mapping.route_field] if mapping.routes else []
    return list(dict.fromkeys(name for name in names if name is not None))


def begins_with(
    source: Input, mapping: Mapping, *, of_rejects: bool, known: Sequence[tuple[int, bytes]]
) -> tuple[int, bytes] | None:
    """The longest of the known beginnings, each as its number of bytes and its digest, that the input has too.

    Raises UserError where it went on in the middle of a line that was imported as a whole one.
    """
    best = None
    for candidate, record, part in _beginnings(_records(source, mapping, of_rejects, final=True), known):
        if not part.endswith(b"\n") and record.seen[len(part) :].strip(b"\r\n"):
            raise went_on(record, source)
        best = candidate
    return best


def shares(source: Input, mapping: Mapping, known: Sequence[tuple[int, bytes]]) -> tuple[int, bytes] | None:
    """The longest of the known beginnings of other files that the input has too, with a line that may bill in it.

    Files of one program have one header, and say nothing by that.
    """
    heads = 1 if mapping.format == "csv" and mapping.columns is None else 0
    found, best = 0, None

    def counted() -> Iterator[Record]:
        nonlocal found
        for record in _records(source, mapping, of_rejects=False, final=True):
            found += bool(record.content.strip())
            yield record

    for candidate, _, _ in _beginnings(counted(), known):
        best = candidate if found > heads else best
    return best


def _beginnings(
    records: Iterator[Record], known: Sequence[tuple[int, bytes]]
) -> Iterator[tuple[tuple[int, bytes], Record, bytes]]:
    """The known beginnings that these records have, the shorter first: with the record that each ends in, and its part
    of that."""
    hasher, offset = hashlib.blake2b(digest_size=16), 0
    waiting = sorted(known, reverse=True)
    for record in records if waiting else ():
        end = offset + record.size
        while waiting and waiting[-1][0] <= end:
            candidate = waiting.pop()
            part = record.seen if candidate[0] == end else record.seen[: candidate[0] - offset]
            until = hasher.copy()
            until.update(part)
            if until.digest() == candidate[1]:
                yield candidate, record, part
        if not waiting:
            break
        hasher.update(record.seen)
        offset = end


def went_on(record: Record, source: Input) -> UserError:
    """What was taken as whole by --final was not."""
    return UserError(
        f"line {record.number} of {source.name} was not whole when it was imported with --final, and has gone on since:"
        " what it bills now is not what was billed. Compare the two, and import what follows it as a file of its own"
    )


def _records(
    source: Input,
    mapping: Mapping,
    of_rejects: bool,
    final: bool,
    alone: Callable[[Record], bool] = lambda _: False,
) -> Iterator[Record]:
    if mapping.format != "csv" or mapping.quote == "none" or of_rejects:
        return lines(source)
    columns = None if mapping.columns is None else len(mapping.columns)
    delimiter = mapping.delimiter or DEFAULT_DELIMITER
    return csv_records(source, final=final, delimiter=delimiter, columns=columns, alone=alone)
