"""Keys of lines: the same in every file and run, bounded in memory."""

from __future__ import annotations

import tracemalloc
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

from tallymark_collector.imports.extraction import Line
from tallymark_collector.imports.identity import Occurrences, cause, key_of_id
from tallymark_collector.imports.importer import PIECE_BYTES, Watching, run
from tallymark_collector.imports.lines import MAX_LINE
from tallymark_collector.model import Batch
from tallymark_collector.store import Store
from tests.support.logs import fetch, line, request


def test_keys_never_change() -> None:
    """They are in databases: what was imported with other ones would be billed again."""
    lines = Occurrences()
    assert [str(lines.key(each)) for each in (b"a", b"b", b"a")] == [
        "8ad01b0a-ab90-4b6b-09e6-4267814db4e9",
        "1805020c-6b75-1f1d-66a0-06792faa02d3",
        "4ee1c914-6c2e-4218-1c7b-bd4247be6a03",
    ]
    assert str(key_of_id("a")) == "fbc7e3e0-c48d-4873-b1d4-8f39b173a245"
    assert cause(UUID(int=2**128 - 1)) == -1
    assert cause(UUID(int=5 << 64)) == 5


def test_equal_lines_are_told_apart_and_the_same_in_each_run() -> None:
    content = [b"a", b"b", b"a", b"a", b"c", b"b"]
    first, second = Occurrences(), Occurrences()
    keys = [first.key(each) for each in content]
    assert len(set(keys)) == 6
    assert [second.key(each) for each in content] == keys
    cut = Occurrences()
    assert {cut.key(each) for each in content[2:]} <= set(keys)


def test_a_window_of_different_lines_is_remembered() -> None:
    lines = Occurrences(window=10)
    first = lines.key(b"x")
    for number in range(9):
        lines.key(b"%d" % number)
    assert lines.key(b"x") != first
    for number in range(9):
        lines.key(b"other %d" % number)
    third = lines.key(b"x")
    assert third != first
    for number in range(40):
        lines.key(b"far %d" % number)
    assert lines.key(b"x") == first, "forgotten, as the page says"


def test_memory_is_bounded_by_the_window() -> None:
    lines, numbers = Occurrences(window=1000), count()

    def peak_of(many: int) -> int:
        tracemalloc.start()
        try:
            for _ in range(many):
                lines.key(b"%d" % next(numbers))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_of(2_000)
    assert peak_of(20_000) < 1.5 * peak_of(4_000)


class Measuring:
    """Notes how much each write takes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.pieces: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, batch: Batch, beside: Any) -> Any:
        self.pieces.append(len(batch.points))
        return await self._store.write(batch, beside)


async def test_a_piece_is_bounded_by_lines_and_by_bytes(store: Store, dsn: str, tmp_path: Path) -> None:
    small, large = tmp_path / "small.log", tmp_path / "large.log"
    small.write_text("".join(line(n) for n in range(250)))
    large.write_text("".join(line(n, path="/" + "x" * (MAX_LINE - 500)) for n in range(60)))
    measured = Measuring(store)
    await run(measured, request(piece_lines=100), [str(small)], Watching())  # type: ignore[arg-type]
    assert measured.pieces == [200, 200, 100]
    measured.pieces.clear()
    await run(measured, request(piece_lines=100), [str(large)], Watching())  # type: ignore[arg-type]
    assert max(measured.pieces) <= 2 * (PIECE_BYTES // (MAX_LINE - 500) + 1)
    assert sum(measured.pieces) == 2 * 60
    assert fetch(dsn, "SELECT count(*) FROM usage_point") == [(2 * 310,)]


def test_a_line_without_quantities_has_no_points() -> None:
    assert Line("acme", 1, None, ()).points(1) == []
