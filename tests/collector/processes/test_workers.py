"""What a parent makes of what its children say."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import pytest

from tallymark_collector.application import keep_saying
from tallymark_collector.processes.workers import Workers, working

TALKS = """
import sys
from pathlib import Path
sys.stdin.buffer.read(8)
print("a library says hello", flush=True)
print('["no", "object"]', flush=True)
sys.stdout.buffer.write(b"\\xff\\xfe\\n" + b"x" * 200_000 + b"\\n")
print('{"reason": "", "admin_port": 7}', flush=True)
sys.stdin.read()
"""


async def test_a_line_that_is_no_word_of_a_childs_is_told_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    workers = Workers([sys.executable, "-c", TALKS], lambda _: b"", 1)
    async with working(workers, 60):
        await asyncio.wait(
            {asyncio.ensure_future(workers.ready()), *workers.tasks}, return_when=asyncio.FIRST_COMPLETED
        )
        [worker] = workers.all
        assert (workers.serving, worker.admin_port, worker.starts) == (1, 7, 1)
    assert "a library says hello" in caplog.text
    assert "object" in caplog.text
    assert "line that is too long" in caplog.text


WRITES = """
import os, sys
sys.stdin.buffer.read(8)
print('{"reason": "", "admin_port": 7}\\n{"commit_seconds": 1.5}\\n{"commit_seconds": 2.5}', flush=True)
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], "w").close()
    sys.exit(5)
sys.stdin.read()
"""


async def test_what_children_spend_on_writing_is_added_up_beyond_their_ends(tmp_path: Path) -> None:
    """The first of each dies after a word about its load; another takes its place and begins at nothing."""
    workers = Workers([sys.executable, "-c", WRITES, str(tmp_path / "died")], lambda _: b"", 1)
    async with working(workers, 60):
        while workers.commit_seconds < 5 or workers.reason:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (workers.restarts, workers.serving, workers.commit_seconds) == (1, 1, 5)


async def test_the_load_is_told_whenever_there_was_some() -> None:
    spent, told = [1.0], asyncio.Queue[float]()
    saying = asyncio.create_task(keep_saying(told.put_nowait, lambda: spent[0], 0.001))
    assert await asyncio.wait_for(told.get(), 60) == 1.0
    await asyncio.sleep(0.02)
    assert told.empty()
    spent[0] = 2.5
    assert await asyncio.wait_for(told.get(), 60) == 2.5
    saying.cancel()
