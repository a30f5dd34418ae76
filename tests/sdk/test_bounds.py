"""What needs a person has a limit, and nothing is deleted at it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from tallymark import dead_letters, flush, folder, identify, record
from tallymark.assembly import Runtime
from tallymark.dead_letters import DeadLetters, DeadLettersFullError
from tallymark.folder import Folder
from tallymark.reporting import Reporter
from tallymark.testing import delivery_stats
from tests.sdk.dying_process import NOW, SECOND, Process, Stored, heir
from tests.sdk.test_damaged_files import damage


def letters(place: Path) -> list[Path]:
    return sorted(place.rglob("dead-letter/*.json"))


def test_a_collector_that_refuses_everything_for_weeks(
    fresh: Runtime, start_collector: Any, settings: Any, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector = start_collector(lambda number: grpc.StatusCode.INVALID_ARGUMENT)
    fresh.letters._max_bytes = 5000
    fresh.outbox.max_bytes = 4000
    fresh.configure(settings(collector.endpoint, interval_s=0.005))
    recorded, most = 0, 0
    while not (delivery_stats()["held_back"] > 3 and fresh.merger.merged > 3 and recorded > 200):
        with identify(account=f"account-{recorded % 5}"):
            record("calls")
        recorded += 1
        assert flush(0.02) is False
        most = max(most, size_of(state_dir))
    assert sum(path.stat().st_size for path in letters(state_dir)) <= 5000
    assert most < 5000 + 3 * 4000 + 4 * 65536, "letters, outbox, segments"
    assert "See to the reason, the last one is: INVALID_ARGUMENT" in caplog.text
    assert all(r.levelno == logging.ERROR for r in caplog.records if "is full (5000 bytes)" in r.message)
    # The reason is seen to: what was refused from then on is taken.
    collector.answer = lambda number: None
    for batch in fresh.outbox.batches():
        fresh.outbox.postpone(batch, 0)
    flush(60)  # may tell of what was refused before
    assert flush(60)
    kept = letters(state_dir)
    assert delivery_stats()["rejected_points"] == sum(json.loads(path.read_text())["rejected_points"] for path in kept)
    # A part of a request that had a letter already is sent again with the whole of it.
    assert recorded - sum(usage_in(path) for path in kept) <= collector.totals()["calls"] <= recorded


def size_of(folder: Path) -> int:
    """Bytes of the files there, while others are removed."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += (Path(parent) / name).stat().st_size
    return found


def usage_in(path: Path) -> int:
    message = json.loads(path.read_text())["request"]
    return sum(
        int(point["asInt"])
        for metric in message["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
        if metric["name"] == "calls"
        for point in metric["sum"]["dataPoints"]
    )


def test_room_that_somebody_makes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "LOOK_AGAIN_S", 0.0)
    kept = DeadLetters(Reporter(0), max_bytes=400)
    kept.place = tmp_path
    kept.keep(b"", 1, "because")
    kept.keep(b"", 1, "because again, which is the same file")
    (tmp_path / "dead-letter" / "of another process").write_bytes(bytes(400))
    with pytest.raises(DeadLettersFullError, match="is full"):
        kept.keep(b"\x0a\x00", 1, "another")
    assert (kept.held_back, kept.points) == (1, 1)
    (tmp_path / "dead-letter" / "of another process").unlink()
    kept.keep(b"\x0a\x00", 1, "another")
    assert len(letters(tmp_path)) == 2


def test_damaged_files_past_the_limit_stay_and_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place, collector = tmp_path / "state" / "service", Stored()
    monkeypatch.setattr(folder, "MAX_DAMAGED_BYTES", 100)
    process = Process(place)
    for n in range(4):
        process.add(10**n)
        process.cut()
    where = process.journal.where()
    assert where is not None
    process.die()
    broken = damage(where / "00000002.otlp", lambda data: data.__setitem__(3, data[3] ^ 0xFF))
    (where / "00000003.segment").write_bytes(b"no segment at all" * 10)
    (where / "notes.txt").write_bytes(b"mine")
    process = Process(place, "first", NOW + 60 * SECOND)
    for _ in range(3):
        process.recover()
        process.deliver(collector)
    assert collector.totals() == {"m": 1101}
    assert {path.name: path.read_bytes() for path in where.iterdir() if path.suffix == ".damaged"} == {
        "00000002.otlp.damaged": broken,
        "00000003.segment.damaged": b"no segment at all" * 10,
    }
    assert [path.read_bytes() for path in (place / "damaged").iterdir()] == [b"mine"]
    assert "is full (100 bytes)" in caplog.text
    free = Folder.adopt(where)
    assert free is not None
    free.release()
    process.die()
    # Where there is room again, the next process moves them.
    monkeypatch.setattr(folder, "MAX_DAMAGED_BYTES", 10_000)
    heir(place, collector)
    assert collector.totals() == {"m": 1101}
    assert len(list((place / "damaged").iterdir())) == 3
