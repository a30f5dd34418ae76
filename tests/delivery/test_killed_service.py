"""SIGKILL of a whole service, server, workers and all: every call that was answered is billed, once, after a restart.

Everything is real: uvicorn with several workers, the example service, the collector, the database.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import psycopg

from tests.support.collector import running

WORKERS = 2
REQUESTS = 400
ROUNDS = 2
PATIENCE = 60.0


@contextmanager
def service(port: int, environ: dict[str, str], log: Path) -> Iterator[None]:
    """The service; at the end all of its processes are killed at once."""
    arguments = ["-m", "uvicorn", "tallymark_collector.demo.service:app", "--workers", str(WORKERS)]
    with log.open("ab") as written:
        server = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port), "--log-level", "warning"],
            env={**os.environ, **environ},
            stdout=written,
            stderr=written,
        )
    try:
        yield
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        server.wait(60)


async def drive(port: int, requests: int) -> int:
    """Answered requests. Raises where one has no answer: nobody kills while it drives."""
    answered = 0
    deadline = time.monotonic() + PATIENCE

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal answered
        url = f"http://127.0.0.1:{port}/search?q=time"
        async with session.get(url, headers={"x-api-key": f"key-acct-{number % 20:03}"}) as response:
            await response.read()
            assert response.status == 200
            answered += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=6)) as session:
        while True:
            try:
                await ask(session, 0)
                break
            except aiohttp.ClientConnectionError:
                assert time.monotonic() < deadline, "the service did not start"
                await asyncio.sleep(0.1)
        await asyncio.gather(*(ask(session, number) for number in range(requests - 1)))
    return answered


def billed(dsn: str) -> int:
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        row = connection.execute(
            "SELECT coalesce(sum(quantity), 0) FROM usage_hourly WHERE meter = 'api.requests'"
        ).fetchone()
        assert row is not None
        return int(row[0])


def test_answered_is_billed(dsn: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "service.log"
    answered = 0
    with running(dsn) as collector:
        environ = {
            "TALLYMARK_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "TALLYMARK_EXPORT_INTERVAL": "300",  # longer than a round: what is killed has been sent by nobody
            "TALLYMARK_STATE_DIR": str(tmp_path / "state"),
        }
        for _ in range(ROUNDS):
            with service(port, environ, log):
                answered += asyncio.run(drive(port, REQUESTS))
        assert billed(dsn) < answered, "the kills came too late to mean anything"
        with service(port, {**environ, "TALLYMARK_EXPORT_INTERVAL": "0.5"}, log):
            answered += asyncio.run(drive(port, 20))
            deadline = time.monotonic() + PATIENCE
            while billed(dsn) < answered and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(2)  # a few intervals more, in which anything sent twice would show
        assert billed(dsn) == answered, log.read_text()[-2000:]
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT count(*) FROM tallymark.usage_quarantine").fetchone() == (0,)
