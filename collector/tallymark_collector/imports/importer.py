"""Files to committed points, a piece at a time. A process that is killed anywhere goes on where it was.

A piece's points, its lines and how far the file is read then are committed together, after its rejects are on the disk.
So a line is billed once, whatever is read again: the same file is known by its beginning and read on from where it was;
in any other file of the source its lines are known one by one.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from tallymark_collector import wire
from tallymark_collector.errors import UserError
from tallymark_collector.imports import identity, reading
from tallymark_collector.imports.extraction import Extraction, Line
from tallymark_collector.imports.faults import LineFault, LineSkipped, TooOld
from tallymark_collector.imports.lines import STDIN, Input, Record, opened
from tallymark_collector.imports.mapping import Mapping, mapping_of
from tallymark_collector.imports.reading import Found, Reading
from tallymark_collector.imports.rejects import Origin, Rejects
from tallymark_collector.imports.succession import registration
from tallymark_collector.imports.summary import Summary
from tallymark_collector.model import Batch, Point, Quarantined, Reason, Refusal
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import Store, imports, quiet
from tallymark_collector.store.imports import Kept, KnownFile, NewLine, Progress, Registration
from tallymark_collector.store.rows import HOUR_NS, timestamp

PIECE_LINES: Final = 5_000
PIECE_BYTES: Final = 4 * 1024 * 1024
"""What one transaction takes: a piece ends with the record that passes either."""

MAX_SOURCE: Final = 128
"""Characters of a source's name."""

_NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True)
class Request:
    """What is to be imported."""

    source: str
    mapping: Mapping
    final: bool = False
    """A last line without its end is whole."""
    oldest: datetime | None = None
    """Takes lines from this time on; None: as old as a collector takes them."""
    again: bool = False
    """What another source has is billed by this one too."""
    of_rejects: bool = False
    """The files are reject files, mended."""
    rejects_file: Path | None = None
    """None: beside each input."""
    tenant: str = DEFAULT_TENANT
    piece_lines: int = PIECE_LINES
    now_ns: Callable[[], int] = time.time_ns
    redaction: Redaction = STANDARD
    """What is stored of credentials in dimensions. Rejects are the user's own file, and hold lines as they are."""

    @property
    def origin(self) -> Origin:
        """Whose lines they are, and where they come from."""
        return Origin(self.tenant, self.source)

    @property
    def rejected(self) -> Origin | None:
        """Whose rejects the files hold; None where they are what was logged."""
        return self.origin if self.of_rejects else None


@dataclass
class Watching:
    """Is told how it goes."""

    note: Callable[[str], None] = quiet
    opened: Callable[[Input], None] = lambda _: None
    went_on: Callable[[Input, int], None] = lambda _, __: None
    """The input, and how many of its lines are committed."""


def window(request: Request, kept_from: datetime | None) -> tuple[int, int]:
    """The earliest and latest time that is taken, in nanoseconds. Raises UserError where `oldest` lies too far back."""
    earliest, latest = TimeLimits().window(request.now_ns())
    if request.oldest is not None:
        earliest = max(1, (request.oldest - _EPOCH) // timedelta(microseconds=1) * 1000)
    if kept_from is not None:
        # An hour that is not kept as a whole takes no points.
        kept = -(-((kept_from - _EPOCH) // timedelta(microseconds=1) * 1000) // HOUR_NS) * HOUR_NS
        if request.oldest is not None and earliest < kept:
            raise UserError(
                f"points before {timestamp(kept)} have been dropped from this database: an older line cannot be told"
                " from one that was counted. Give --oldest that time or a later one"
            )
        earliest = max(earliest, kept)
    return earliest, latest


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


async def run(store: Store, request: Request, paths: Sequence[str], watching: Watching) -> Summary:
    """Imports the inputs, in this order. Raises UserError, where everything before was kept, or StoreUnavailable."""
    check(request, paths)
    bounds = window(request, await imports.kept_from(store))
    source = imports.source_id(request.tenant, request.source)
    whole = Summary()
    async with imports.alone(store, source, watching.note):
        kept = await imports.kept(store, source)
        turn = _Turn(source, kept, registration(request.origin, request.mapping.told(), kept))
        for path in paths:
            with ExitStack() as stack:
                file = stack.enter_context(opened(path))
                watching.opened(file)
                whole.add(await _File(store, request, turn, file, bounds, watching).run())
    return whole


def check(request: Request, paths: Sequence[str]) -> None:
    """Raises UserError where the request cannot be meant."""
    if not 0 < len(request.source) <= MAX_SOURCE or not request.source.isprintable():
        raise UserError(f"--source needs a name of 1 to {MAX_SOURCE} characters that can be seen")
    if list(paths).count(STDIN) > 1:
        raise UserError("- (standard input) can be named once")
    if STDIN in paths and request.rejects_file is None:
        raise UserError("standard input has no name to call its rejects by: give --rejects-file")
    if request.rejects_file is not None and len(paths) > 1:
        raise UserError("--rejects-file goes with one input: of several, each has its own beside it")


@dataclass
class _Turn:
    """The source, as long as nobody else imports it."""

    id: UUID
    kept: Kept
    pending: Registration | None
    """The mapping, until it is committed with a piece."""


@dataclass
class _File:
    store: Store
    request: Request
    source: _Turn
    input: Input
    bounds: tuple[int, int]
    watching: Watching
    summary: Summary = field(default_factory=lambda: Summary(files=1))

    async def run(self) -> Summary:
        request = self.request
        known = await self._known()
        file, start = (uuid4(), Progress(0, 0, b"")) if known is None else known
        extraction = Extraction(request.mapping, request.tenant, request.source, self.bounds, request.redaction)
        if known is None:
            await self._check_other_sources()
            self._check_age(extraction)
        under_way = Reading(self.input, request.mapping, final=request.final, of_rejects=request.rejected)
        with self._rejects() as rejects:
            await self._import(under_way, extraction, rejects, file, start)
        return self.summary

    def _rejects(self) -> Rejects:
        path = self.request.rejects_file or Path(f"{self.input.name}.rejects")
        return Rejects(path, self.request.origin, self.input.name)

    async def _known(self) -> KnownFile | None:
        """This file, if it was read before: the one of which it has the longest beginning."""
        if not self.input.repeatable or (self.source.pending and self.source.pending.forgets):
            return None
        files = {each.progress[::2]: each for each in await imports.files(self.store, self.source.id)}
        with opened(self.input.name) as again:
            found = reading.begins_with(
                again, self.request.mapping, of_rejects=self.request.of_rejects, known=list(files)
            )
        return None if found is None else files[found]

    async def _check_other_sources(self) -> None:
        """Raises UserError where another source of the tenant has the file: each of its lines would be billed again."""
        request = self.request
        if not self.input.repeatable or request.of_rejects or request.again:
            return
        others = await imports.elsewhere(self.store, request.tenant, self.source.id)
        files = {each.progress[::2]: each for each in others}
        with opened(self.input.name) as again:
            found = reading.shares(again, request.mapping, list(files))
        if found is not None:
            name, path, progress = files[found]
            raise UserError(
                f"{self.input.name} begins with the {progress.lines:,} lines of {path} that the source {name!r} has:"
                f" under {request.source!r} each would be billed again. Import it with --source {shlex.quote(name)}, or"
                " with --again where it is meant to be billed for both"
            )

    def _check_age(self, extraction: Extraction) -> None:
        """Raises UserError where the first line that has a time is older than what is taken: all would be rejected."""
        if not self.input.repeatable or self.request.of_rejects or self.request.oldest is not None:
            return
        with opened(self.input.name) as again:
            first = Reading(again, self.request.mapping)
            for number, (record, key) in enumerate(first.records()):
                found = first.read(record, key, extraction)
                if found.line is not None or number >= _LOOK_AHEAD:
                    return
                if isinstance(found.fault, TooOld):
                    raise UserError(
                        f"line {record.number} of {self.input.name}: {str(found.fault).partition(';')[0]}. Where these"
                        " lines are to be billed, say from when on, e.g. --oldest 2015-01-01"
                    )

    async def _import(
        self, under_way: Reading, extraction: Extraction, rejects: Rejects, file: UUID, start: Progress
    ) -> None:
        piece = _Piece(start)
        for record, key in under_way.records():
            if under_way.bytes <= start.size or (start.size and under_way.lines <= start.lines):
                continue
            if under_way.bytes - record.size < start.size:
                raise reading.went_on(record, self.input)
            found = under_way.read(record, key, extraction)
            if found.fault is not None:
                rejects.add(record, found.key, str(found.fault), under_way.columns)
                self.summary.reject(str(found.fault))
            piece.take(found, record)
            if piece.lines >= self.request.piece_lines or piece.bytes >= PIECE_BYTES:
                await self._write(piece, under_way, rejects, file)
                piece = _Piece(_progress(under_way))
        if under_way.bytes > start.size:
            await self._write(piece, under_way, rejects, file)
        self.summary.before = start.lines
        # What an import with --final took of the file is not left, whatever this one says of its end.
        if under_way.bytes >= start.size:
            self.summary.left = under_way.left
            self.summary.unclosed += [under_way.unclosed] if under_way.unclosed else []

    async def _write(self, piece: _Piece, under_way: Reading, rejects: Rejects, file: UUID) -> None:
        after = _progress(under_way)
        if after.size == piece.start.size:
            return
        there = await imports.known(self.store, self.source.id, [found.key for found, _ in piece.found])
        points, lines, conflicts = self._sorted_out(piece, there)
        self.summary.skipped += piece.skipped
        self.summary.lines += after.lines - piece.start.lines
        self.summary.blank += after.lines - piece.start.lines - piece.lines
        rejects.save()
        advance = partial(
            imports.advance,
            source=self.source.id,
            file=file,
            path=self.input.name,
            before=piece.start,
            after=after,
            lines=lines,
            repeatable=self.input.repeatable,
            registration=self.source.pending,
        )
        result = await self.store.write(Batch(points=points, quarantined=conflicts), advance)
        self.source.pending = None
        self.summary.quarantined += len(result.conflicts)
        self.watching.went_on(self.input, after.lines)

    def _sorted_out(
        self, piece: _Piece, there: dict[UUID, imports.Stored]
    ) -> tuple[list[Point], list[NewLine], list[Quarantined]]:
        points: list[Point] = []
        lines: list[NewLine] = []
        conflicts: list[Quarantined] = []
        for found, number in piece.found:
            line = found.line
            assert line is not None, "only lines that bill are kept in a piece"
            digest = identity.digest(line)
            before = there.get(found.key)
            if before is None:
                there[found.key] = imports.Stored(digest, self.input.name, number)
                points += line.points(identity.cause(found.key))
                lines.append(NewLine(found.key, number, digest, line.account, line.time_ns))
                self.summary.accept(line)
            elif before.digest == digest or self._was_read_otherwise(found, before.digest):
                self.summary.duplicates += 1
            else:
                self.summary.conflicts += 1
                conflicts += _contradicting(line, before)
        return points, lines, conflicts

    def _was_read_otherwise(self, found: Found, digest: int) -> bool:
        """Whether it is the same line all the same, read by a mapping of the time before a table had grown."""
        assert found.line is not None, "only lines that bill are kept in a piece"
        assert found.fields is not None, "they have fields"
        for extraction in self._earlier:
            with suppress(LineFault, LineSkipped):
                if identity.digest(extraction.line(found.fields)) == digest:
                    return True
        return False

    @cached_property
    def _earlier(self) -> list[Extraction]:
        request, told = self.request, self.request.mapping.told()
        return [
            Extraction(mapping_of(each), request.tenant, request.source, self.bounds, request.redaction)
            for each in reversed(self.source.kept.mappings)
            if each != told
        ]


_LOOK_AHEAD: Final = 1000
"""Lines that are looked at for the first one with a time."""


def _progress(under_way: Reading) -> Progress:
    return Progress(under_way.bytes, under_way.lines, under_way.digest())


def _contradicting(line: Line, before: imports.Stored) -> list[Quarantined]:
    detail = f"line {before.line} of {before.path} had the same id and other values"
    refusal = Refusal(Reason.VALUE_CONFLICT, detail)
    found = []
    for point in line.points(0):
        series, payload = point.stream.series, wire.encode_point(point)
        found.append(
            Quarantined(series.tenant, series.account, series.meter, point.time_ns, refusal, "metrics", payload)
        )
    return found


class _Piece:
    """Records that one transaction takes."""

    def __init__(self, start: Progress) -> None:
        self.start = start
        self.found: list[tuple[Found, int]] = []
        self.lines = 0
        self.bytes = 0
        self.skipped = 0

    def take(self, found: Found, record: Record) -> None:
        """Adds a record."""
        self.lines += record.lines
        self.bytes += record.size
        self.skipped += found.skipped
        if found.line is not None:
            self.found.append((found, record.number))
