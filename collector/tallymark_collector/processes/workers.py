"""Children that take requests: started, listened to, started again, ended.

A child is told its work on stdin, which stays open: its end tells the child that the parent is gone, however it went.
On stdout it says, in lines of JSON, that it is ready, why it is not, why it could not start, or how long it has been
writing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from tallymark_collector.errors import TransientError, UserError

logger = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.5
MAX_PAUSE: Final = 30.0
"""Seconds before a child that died is started again: doubled each time, to this."""
STEADY: Final = 60.0
"""A child that lived so long was a sound one: the next pause is the first again."""
WRONG: Final = 2
"""The exit status of a child that a person has to help."""

_VERBOSITY: Final = "GRPC_VERBOSITY"


class Worker:
    """One child, whichever process it is just now."""

    def __init__(self, number: int, work: bytes) -> None:
        self.number = number
        self.work = work
        self.pid = 0
        self.admin_port: int | None = None
        self.reason = "it is starting"
        """Why it takes no usage; "" where it does."""
        self.starts = 0
        self.failed = ""
        """What it said when it could not start."""
        self.ready = asyncio.Event()
        """Set once it has been ready."""
        self.process: Process | None = None
        self.commit_seconds = 0.0
        """What all processes that this one has been spent on transactions with points."""
        self._former_seconds = 0.0

    def begin(self, process: Process) -> None:
        """It is this process from now on."""
        self.process, self.pid = process, process.pid
        self.starts += 1
        self.reason, self.failed = "it is starting", ""
        self._former_seconds = self.commit_seconds

    def hear(self, said: bytes) -> None:
        """Takes what the child says. What is none of its words is for the log: any library may print a line."""
        try:
            line = json.loads(said)
        except ValueError:  # UnicodeDecodeError, too
            line = None
        if not isinstance(line, dict):
            logger.warning("process %d wrote to its stdout, where its parent listens: %.200r", self.pid, said)
            return
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "commit_seconds" in line:
            self.commit_seconds = self._former_seconds + float(line["commit_seconds"])
            return
        self.failed = line.get("failed", "")
        self.reason = line.get("reason", self.failed)
        if "admin_port" in line:
            self.admin_port = line["admin_port"]
            self.ready.set()


class Workers:
    """All children of this process."""

    def __init__(self, command: Sequence[str], work: Callable[[int], bytes], count: int) -> None:
        self.all = [Worker(number, work(number)) for number in range(1, count + 1)]
        self.tasks: set[asyncio.Task[None]] = set()
        """One for each; they end with the end, or raise UserError or TransientError where a child never started."""
        self._command = command
        self._end = asyncio.Event()

    @property
    def serving(self) -> int:
        """How many take usage."""
        return sum(not worker.reason for worker in self.all)

    @property
    def restarts(self) -> int:
        """How often one that had died was started again."""
        return sum(max(worker.starts - 1, 0) for worker in self.all)

    @property
    def commit_seconds(self) -> float:
        """Seconds that all of them have spent on transactions with points, side by side."""
        return sum(worker.commit_seconds for worker in self.all)

    @property
    def reason(self) -> str:
        """Why none takes usage; "" where one does: the kernel gives connections to those that listen."""
        return "" if self.serving else "; ".join(sorted({worker.reason for worker in self.all}))

    async def ready(self) -> None:
        """Returns once all are."""
        for worker in self.all:
            await worker.ready.wait()

    def start(self) -> None:
        """Starts them all."""
        self.tasks = {asyncio.create_task(self._keep(worker)) for worker in self.all}

    async def end(self, patience: float) -> None:
        """Has all of them finish what is under way; who takes longer than that many seconds is killed."""
        self._end.set()
        for worker in self.all:
            _signal(worker.process, "terminate")
        _, late = await asyncio.wait(self.tasks, timeout=patience)
        for worker in self.all if late else ():
            if worker.process is not None and worker.process.returncode is None:
                logger.error("process %d does not end and is killed", worker.pid)
                _signal(worker.process, "kill")
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _keep(self, worker: Worker) -> None:
        pause = FIRST_PAUSE
        ending = asyncio.ensure_future(self._end.wait())
        try:
            while not self._end.is_set():
                began = time.monotonic()
                status = await self._run(worker)
                if self._end.is_set():
                    return
                if not worker.ready.is_set():
                    said = worker.failed or f"a process of the collector could not start (status {status})"
                    raise UserError(said) if status == WRONG else TransientError(said)
                if time.monotonic() - began > STEADY:
                    pause = FIRST_PAUSE
                why = f" ({worker.failed})" if worker.failed else ""
                logger.error("process %d ended, status %d%s: another in %g s", worker.pid, status, why, pause)
                await asyncio.wait({ending}, timeout=pause)
                pause = min(pause * 2, MAX_PAUSE)
        finally:
            ending.cancel()

    async def _run(self, worker: Worker) -> int:
        """One life of a child; returns its exit status."""
        environment = {_VERBOSITY: "NONE", **os.environ}
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        worker.begin(process)
        try:
            if self._end.is_set():
                _signal(process, "terminate")
            process.stdin.write(len(worker.work).to_bytes(8, "big") + worker.work)
            while line := await _line(process.stdout):
                worker.hear(line)
            return await process.wait()
        finally:
            worker.reason = worker.reason or "its process has ended"
            process.stdin.close()


async def _line(stdout: asyncio.StreamReader) -> bytes:
    """The next line, without its middle and end where it is longer than a pipe's reader takes; b"" at the end."""
    try:
        return await stdout.readline()
    except ValueError:  # what was read of it is gone
        return b"(a line that is too long)"


def _signal(process: Process | None, name: str) -> None:
    if process is not None and process.returncode is None:
        with suppress(ProcessLookupError):
            getattr(process, name)()


@asynccontextmanager
async def working(workers: Workers, patience: float) -> AsyncIterator[Workers]:
    """Children while the context lasts, and none after it."""
    workers.start()
    try:
        yield workers
    finally:
        # Shielded: a second signal must not leave children behind.
        await asyncio.shield(workers.end(patience))
