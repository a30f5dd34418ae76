"""What a parent makes of what its children say."""

from __future__ import annotations

import asyncio
import logging
import sys

import pytest

from tallymark_collector.processes.workers import Workers, working

TALKS = """
import sys
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
