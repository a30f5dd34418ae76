"""The spool: order, restarts, damage, limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.forwarding.spool import Spool

HEAD = 16
"""Bytes before a body."""


def opened(folder: Path, max_bytes: int = 1_000_000, max_files: int = 1000) -> Spool:
    return Spool(folder, max_bytes, max_files)


def drained(spool: Spool) -> list[tuple[str, bytes | None]]:
    found = []
    while (entry := spool.oldest()) is not None:
        found.append((entry.signal, spool.read(entry)))
        assert spool.remove(entry)
    return found


def test_what_is_kept_comes_out_in_its_order_also_after_a_restart(tmp_path: Path) -> None:
    spool = opened(tmp_path / "a" / "b")
    sent = [(("metrics", "traces", "logs")[i % 3], b"%d" % i) for i in range(12)]
    for signal, body in sent:
        assert spool.append(signal, body) == 0
    first = spool.oldest()
    assert first is not None
    spool.remove(first)
    spool.close()
    again = opened(tmp_path / "a" / "b")
    again.append("logs", b"later")
    again.close()
    again = opened(tmp_path / "a" / "b")
    assert drained(again) == [*sent[1:], ("logs", b"later")]
    assert again.waiting == 0
    again.append("logs", b"x")
    again.close()
    assert drained(opened(tmp_path / "a" / "b")) == [("logs", b"x")]


def test_the_folder_is_one_collectors_alone(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(UserError, match="is in use by another collector"):
        opened(tmp_path)
    spool.close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--forward-dir .*file cannot be used: "):
        opened(tmp_path / "file")


def test_files_that_are_half_written_or_damaged_are_no_requests(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for body in (b"one", b"two", b"", b"four"):
        spool.append("metrics", body)
    spool.close()
    first, second, *_ = sorted(tmp_path.glob("*.metrics"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    (tmp_path / "0000000000000009.metrics.tmp").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("of a person's own")
    again = opened(tmp_path)
    assert drained(again) == [("metrics", None), ("metrics", None), ("metrics", b""), ("metrics", b"four")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "notes.txt"]


def test_past_the_limit_the_oldest_go_first_and_are_counted(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_bytes=3 * (HEAD + 10))
    dropped = [spool.append("metrics", b"%010d" % i) for i in range(5)]
    assert dropped == [0, 0, 0, 1, 1]
    assert spool.append("metrics", bytes(2 * (HEAD + 10) - HEAD)) == 2
    assert spool.append("metrics", bytes(1000)) == 1, "it alone is more than the folder may hold"
    assert [len(body or b"") for _, body in drained(spool)] == [10, 2 * (HEAD + 10) - HEAD]


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=2)
    assert [spool.append("logs", b"%d" % i) for i in range(4)] == [0, 0, 1, 1]
    assert drained(spool) == [("logs", b"2"), ("logs", b"3")]


def test_what_was_dropped_meanwhile_is_neither_read_nor_removed_again(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=1)
    spool.append("logs", b"old")
    entry = spool.oldest()
    assert entry is not None
    spool.append("logs", b"new")
    assert spool.read(entry) is None
    assert not spool.remove(entry)
    assert spool.waiting == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_disk_that_takes_nothing_raises_and_keeps_the_rest(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append("logs", b"x")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="denied"):
            spool.append("logs", b"y")
    finally:
        tmp_path.chmod(0o700)
    assert drained(spool) == [("logs", b"x")]
