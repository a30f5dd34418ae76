"""The reject file: what could not be read, one JSON object a line, to be mended and imported again.

    {"source": …, "tenant": …, "file": …, "line": 8899, "id": …, "reason": …, "text": …}

`text` is what a person mends; `id` says which line of the source it is, so that it is billed once, whenever and however
often it is imported. Records are on the disk before the progress that passes their lines is committed; after a crash a
line is read again, and its record found by its id instead of being written twice. The file is only ever added to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple
from uuid import UUID

from tallymark_collector.errors import UserError
from tallymark_collector.imports.faults import LineFault
from tallymark_collector.imports.lines import Record
from tallymark_collector.settings import DEFAULT_TENANT

MAX_SHOWN: Final = 1000
"""Characters kept of a line that is too long to be mended here."""


class Origin(NamedTuple):
    """Whose lines they are, and where they come from."""

    tenant: str
    source: str

    def mismatch(self, other: Origin) -> tuple[str, str] | None:
        """What the other one differs in, and how that is called there; None where it is the same."""
        if other.source != self.source:
            return "source", other.source
        return None if other.tenant == self.tenant else ("tenant", other.tenant)


class Reject(NamedTuple):
    """A line that was rejected before."""

    id: UUID
    origin: Origin
    text: str
    columns: tuple[str, ...] | None
    """Of the CSV file that it stood in."""
    file: str
    line: int


class Rejects:
    """The reject file of one input, which is made with the first record. A context manager."""

    def __init__(self, path: Path, origin: Origin, file: str) -> None:
        """Raises UserError where something else is there already, or it cannot be read."""
        self._path, self._origin, self._file = path, origin, file
        self._there = _ids(path, origin)
        self._opened: BinaryIO | None = None
        self._pending: list[str] = []

    def __enter__(self) -> Rejects:
        """Nothing is opened before there is something to write."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file; what was not saved belongs to lines that will be read again."""
        if self._opened is not None:
            self._opened.close()

    def add(self, record: Record, identity: UUID, reason: str, columns: Sequence[str] | None) -> None:
        """Notes a record. It is on the disk after `save`."""
        if identity in self._there:
            return
        text = record.content.decode(errors="backslashreplace")
        said: dict[str, object] = {
            "source": self._origin.source,
            "tenant": self._origin.tenant,
            "file": self._file,
            "line": record.number,
            "id": str(identity),
            "reason": reason,
        }
        if columns is not None:
            said["columns"] = list(columns)
        if record.fault is not None and len(text) > MAX_SHOWN:
            said |= {"text": None, "begins": text[:MAX_SHOWN]}
        else:
            said["text"] = text
        self._pending.append(json.dumps(said, ensure_ascii=False) + "\n")

    def save(self) -> None:
        """Brings what was noted to the disk. Raises UserError."""
        if not self._pending:
            return
        try:
            if self._opened is None:
                self._opened = self._path.open("ab")
            self._opened.write("".join(self._pending).encode(errors="backslashreplace"))
            self._opened.flush()
            os.fsync(self._opened.fileno())
        except OSError as error:
            raise UserError(
                f"the reject file {self._path} cannot be written: {error.strerror}; name another with --rejects-file"
            ) from None
        self._pending.clear()


def _ids(path: Path, origin: Origin) -> set[UUID]:
    """The ids of the records that are there. What a crash left of a last record is cut off: its line is read again."""
    if not path.exists():
        return set()
    found, whole = set(), 0
    try:
        with path.open("rb") as opened:
            for content in opened:
                try:
                    record = _parsed(content)
                except LineFault:
                    if content.endswith(b"\n") or not _is_torn(content):
                        raise UserError(
                            f"{path} exists and is no reject file: move it away, or name another with --rejects-file"
                        ) from None
                    break
                if other := origin.mismatch(_origin(record)):
                    raise UserError(
                        f"{path} holds rejects of the {other[0]} {other[1]!r}: move it away, or name another with"
                        " --rejects-file"
                    )
                found.add(UUID(record["id"]))
                whole += len(content)
                ended = content.endswith(b"\n")
        if whole < path.stat().st_size:
            os.truncate(path, whole)
        elif found and not ended:
            with path.open("ab") as opened:
                opened.write(b"\n")
    except OSError as error:
        raise UserError(f"the reject file {path} cannot be read: {error.strerror}") from None
    return found


def _is_torn(content: bytes) -> bool:
    start = b'{"source": '
    return content.startswith(start) or start.startswith(content)


def read(record: Record) -> Reject:
    """A record of a reject file. Raises LineFault."""
    if record.fault is not None:
        raise LineFault(record.fault)
    found = _parsed(record.content)
    text = found.get("text")
    if not isinstance(text, str):
        raise LineFault("its text was left out because it is too long: write the mended line into `text`")
    columns = found.get("columns")
    return Reject(
        UUID(found["id"]),
        _origin(found),
        text,
        tuple(map(str, columns)) if isinstance(columns, list) else None,
        str(found["file"]),
        found["line"],
    )


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        UUID(found["id"])
        whole = isinstance(found["line"], int) and all(isinstance(part, str) for part in _origin(found))
        whole = whole and "file" in found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, found = False, {}
    if not whole:
        raise LineFault(
            "it is no record of a reject file: keep `source`, `tenant`, `file`, `line` and `id` as they are, and mend"
            " `text`"
        )
    return dict(found)


def _origin(record: dict[str, Any]) -> Origin:
    # Records of a time in which only the default tenant's lines could be imported name no tenant.
    return Origin(record.get("tenant", DEFAULT_TENANT), record["source"])
