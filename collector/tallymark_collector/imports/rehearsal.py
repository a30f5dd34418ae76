"""What the first lines of a file would bill: without a database, and without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from uuid import UUID

from tallymark_collector.imports import identity
from tallymark_collector.imports.extraction import Extraction, Line
from tallymark_collector.imports.importer import Request, check, window
from tallymark_collector.imports.lines import opened
from tallymark_collector.imports.reading import Reading
from tallymark_collector.imports.summary import Summary

SHOWN: Final = 10
"""Lines that are shown one by one."""


@dataclass(slots=True)
class Rehearsal:
    """What would be billed, and what was wrong."""

    summary: Summary = field(default_factory=Summary)
    lines: list[tuple[str, int, Line]] = field(default_factory=list)
    """The first that bill: file, line number, what."""
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    """The first that are wrong: file, line number, why."""


def rehearse(request: Request, paths: Sequence[str], limit: int) -> Rehearsal:
    """Reads the first `limit` records of each input. Raises UserError. Knows nothing of earlier imports."""
    check(request, paths)
    extraction = Extraction(request.mapping, request.tenant, request.source, window(request, None), request.redaction)
    found = Rehearsal()
    for path in paths:
        with opened(path) as source:
            found.summary.files += 1
            under_way = Reading(source, request.mapping, final=request.final, of_rejects=request.rejected)
            _read(under_way, extraction, path, limit, found)
    return found


def _read(under_way: Reading, extraction: Extraction, path: str, limit: int, found: Rehearsal) -> None:
    summary, there, counted = found.summary, dict[UUID, int](), 0
    for record, key in islice(under_way.records(), limit):
        counted += record.lines
        what = under_way.read(record, key, extraction)
        summary.skipped += what.skipped
        if what.fault is not None:
            summary.reject(str(what.fault))
            if len(found.faults) < SHOWN:
                found.faults.append((path, record.number, str(what.fault)))
        elif what.line is not None:
            digest = identity.digest(what.line)
            before = there.get(what.key)
            there.setdefault(what.key, digest)
            if before is None:
                summary.accept(what.line)
                if len(found.lines) < SHOWN:
                    found.lines.append((path, record.number, what.line))
            elif before == digest:
                summary.duplicates += 1
            else:
                summary.conflicts += 1
    summary.lines += under_way.lines
    summary.blank += under_way.lines - counted
    summary.left += under_way.left
    summary.unclosed += [under_way.unclosed] if under_way.unclosed else []
