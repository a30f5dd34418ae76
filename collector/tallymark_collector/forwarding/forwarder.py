"""From acknowledged requests to the next hop: a queue, the spool, and the task that sends."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tallymark_collector.forwarding.hops import SEND_TIMEOUT, Fate, Hop, Verdict, hop
from tallymark_collector.forwarding.splitting import Parts
from tallymark_collector.forwarding.spool import Entry, Spool
from tallymark_collector.settings import Forwarding

logger = logging.getLogger(__name__)

QUEUE_BYTES: Final = 64 * 1024 * 1024
"""What may wait in memory for the disk. Past it a request is dropped, counted: acknowledgements do not wait."""
FIRST_PAUSE: Final = 1.0
MAX_PAUSE: Final = 60.0
"""Seconds between tries: doubled from the first to this, less up to a half by chance."""
MAX_ASKED_PAUSE: Final = 600.0
"""The longest pause that the next hop can ask for."""
MAX_UNCLEAR: Final = 5
"""Tries of a request that the next hop answers with a fault of its own, or not within the longest time; without an end
one request would stop all."""
MAX_SEND_TIMEOUT: Final = 240.0
"""Seconds that one request and its answer may take at most: doubled from `hops.SEND_TIMEOUT` to this while the next hop
answers others. What takes longer is sent in parts."""
SURELY_QUICK: Final = 64 * 1024
"""Bytes that nothing is slow for: where so few are not answered, it is not for their number, and they wait."""
END_SECONDS: Final = 10.0
"""What the disk gets at the end to take what is queued; the end of the collector waits for nothing else here."""
TELL_INTERVAL: Final = 30.0
"""Seconds between lines in the log about the same kind of trouble."""
_LAST_WORDS: Final = (Fate.TAKEN, Fate.TOO_LARGE, Fate.NEVER)


@dataclass(slots=True)
class Totals:
    """Requests since the process started."""

    sent: int = 0
    """Acknowledged by the next hop."""
    rejected: int = 0
    """Points, spans and records of those that it refused."""
    refused: int = 0
    """Refused by it for good, all of it or some of its parts, or unreadable on the disk: not there."""
    dropped: int = 0
    """For want of room or a working disk: not there."""
    timeouts: int = 0
    """Times that a request was not answered in time."""
    other_tenants: int = 0
    """Of tenants whose requests are not to be sent on."""


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    parts: int = 0
    """In which it was sent."""
    refused: int = 0
    """Of these, for good."""
    refusal: str = ""
    """What the next hop said of the last one."""
    rejected: int = 0
    """Points, spans and records that it refused of those that it took."""
    rejection: str = ""

    def add(self, verdict: Verdict) -> None:
        """The last word on one part."""
        self.parts += 1
        if verdict.fate is not Fate.TAKEN:
            self.refused += 1
            self.refusal = verdict.words
        elif verdict.rejected:
            self.rejected += verdict.rejected
            self.rejection = verdict.words


class Forwarder:
    """Takes what is acknowledged and sends it on."""

    def __init__(self, spool: Spool, hop: Hop, *, first_pause: float = FIRST_PAUSE) -> None:
        self.totals = Totals()
        self._spool = spool
        self._hop = hop
        self._first_pause = first_pause
        self._queue: deque[tuple[str, bytes]] = deque()
        self._queued = 0
        self._more = asyncio.Event()
        self._there = asyncio.Event()
        self._ending = False
        # One thread, so that requests are written in the order of their commits.
        self._disk = ThreadPoolExecutor(1, "tallymark-forward")
        self._told: dict[str, float] = {}
        self._splits = False
        # From how many bytes on requests have needed more than the usual time, and how much they are given.
        self._slow_from, self._patience = sys.maxsize, SEND_TIMEOUT

    @property
    def waiting(self) -> int:
        """Requests that are not acknowledged there yet."""
        return len(self._queue) + self._spool.waiting

    def of_tenant(self, only: str) -> Callable[[str, str, bytes], None]:
        """`accepted` for one tenant's requests, called with whose each is. The next hop knows one credential, and would
        take everybody's for one tenant's."""

        def accepted(tenant: str, signal: str, body: bytes) -> None:
            if tenant == only:
                self.accepted(signal, body)
                return
            if not self.totals.other_tenants:
                logger.warning("requests of tenant %r are not sent on: --forward-tenant is %r", tenant, only)
            self.totals.other_tenants += 1

        return accepted

    def accepted(self, signal: str, body: bytes) -> None:
        """Takes a committed request; neither blocks nor raises."""
        if self._queue and self._queued + len(body) > QUEUE_BYTES:
            self._drop(1, "the disk is too slow for what arrives")
            return
        self._queue.append((signal, body))
        self._queued += len(body)
        self._more.set()

    async def run(self) -> None:
        """Sends until cancelled."""
        sending = asyncio.create_task(self._send_all())
        try:
            while not (self._ending and not self._queue):
                await self._more.wait()
                self._more.clear()
                await self._write_out()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def end(self, running: asyncio.Task[None]) -> None:
        """Writes out what is queued and stops sending; what is on the disk waits for the next start."""
        self._ending = True
        self._more.set()
        _, unfinished = await asyncio.wait({running}, timeout=END_SECONDS)
        if unfinished:
            running.cancel()
            logger.error("%d requests are NOT forwarded: the disk does not take them", len(self._queue))
        self._disk.shutdown(wait=not unfinished, cancel_futures=True)
        if self._spool.waiting:
            logger.info("%d requests wait on the disk to be forwarded at the next start", self._spool.waiting)

    async def _write_out(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            signal, body = self._queue[0]
            try:
                dropped = await loop.run_in_executor(self._disk, self._spool.append, signal, body)
            except Exception as error:  # the disk above all; whatever it is, the next one is tried
                self._drop(1, f"one cannot be written: {error}")
            else:
                if dropped:
                    self._drop(dropped, "the folder is full, the oldest go first")
            self._queue.popleft()
            self._queued -= len(body)
            self._there.set()

    async def _send_all(self) -> None:
        while not self._ending:
            entry = self._spool.oldest()
            if entry is None:
                self._there.clear()
                await self._there.wait()
                continue
            try:
                await self._send(entry)
            except Exception:
                # The disk, or a mistake of ours: to forward must not end unnoticed.
                logger.exception("request %s is not forwarded, the next try is in %s s", entry.name, MAX_PAUSE)
                await asyncio.sleep(MAX_PAUSE)

    async def _send(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._disk, self._spool.read, entry)
        if body is None:
            if await loop.run_in_executor(self._disk, self._spool.remove, entry):
                self.totals.refused += 1
                logger.error("request %s to be forwarded is damaged and is left out", entry.name)
            return
        # In memory alone: after a crash or an end in the middle the whole request is sent again, and the next hop drops
        # what it has.
        parts, outcome, slow = Parts(entry.signal, body), Outcome(), 0
        del body
        while (part := parts.next) is not None:
            if parts.is_too_large and await asyncio.to_thread(parts.split):
                continue
            verdict = await self._answer_to(entry, part)
            if verdict is None:
                return
            if verdict.fate in (Fate.TOO_LARGE, Fate.SLOW) and await asyncio.to_thread(parts.split):
                self._tell_of_parts(len(part), verdict)
                continue
            slow += verdict.fate is Fate.SLOW
            if verdict.fate is Fate.SLOW and slow < MAX_UNCLEAR:
                continue
            slow = 0
            parts.done()
            outcome.add(verdict)
        # Counted once it has left the folder: a request whose removal fails is sent again.
        await loop.run_in_executor(self._disk, self._spool.remove, entry)
        self._count(entry, outcome)

    async def _answer_to(self, entry: Entry, part: bytes) -> Verdict | None:
        """The next hop's last word on a request or a part of it, SLOW where it has none after the longest time but
        answers others; None where the collector ends before, or the request was dropped meanwhile."""
        pause, unclear = self._first_pause, 0
        while not self._ending:
            timeout = self._patience if len(part) >= self._slow_from else SEND_TIMEOUT
            verdict = await self._hop.send(entry.signal, part, timeout)
            unclear += verdict.fate is Fate.UNCLEAR
            if verdict.fate in _LAST_WORDS or unclear >= MAX_UNCLEAR:
                return verdict
            if verdict.fate is Fate.SLOW:
                self.totals.timeouts += 1
                if len(part) > SURELY_QUICK and await self._answers_others(entry.signal):
                    if timeout >= MAX_SEND_TIMEOUT:
                        return verdict
                    self._wait_longer(len(part), timeout, verdict)
            waiting = max(pause * random.uniform(0.5, 1), min(verdict.delay or 0.0, MAX_ASKED_PAUSE))  # noqa: S311
            self._tell("later", "the next hop takes nothing (%s); %d requests wait", verdict.words, self.waiting)
            await asyncio.sleep(waiting)
            pause = min(pause * 2, MAX_PAUSE)
            if self._spool.oldest() != entry:
                return None  # for want of room
        return None

    async def _answers_others(self, signal: str) -> bool:
        """Whether the next hop answers a request that holds nothing: if not, it is not for the size of the others that
        they have no answer, and nothing is to be done but wait."""
        return (await self._hop.send(signal, b"", SEND_TIMEOUT)).fate in _LAST_WORDS

    def _wait_longer(self, size: int, timeout: float, verdict: Verdict) -> None:
        """Gives requests of that size, and larger ones, more time than they had."""
        self._slow_from = min(self._slow_from, size)
        self._patience = max(self._patience, min(timeout * 2, MAX_SEND_TIMEOUT))
        self._tell(
            "slow",
            "the next hop answers, but not to a request of %d bytes within %g s (%s): such requests get %g s from now",
            *(size, timeout, verdict.words, self._patience),
        )

    def _count(self, entry: Entry, outcome: Outcome) -> None:
        if outcome.refused:
            self.totals.refused += 1
            logger.error(
                "the next hop refuses %srequest %s for good (%s): it is left out, %d until now",
                f"{outcome.refused} of {outcome.parts} parts of " if outcome.parts > 1 else "",
                entry.name,
                outcome.refusal,
                self.totals.refused,
            )
        else:
            self.totals.sent += 1
        if outcome.rejected:
            self.totals.rejected += outcome.rejected
            self._tell(
                "rejected", "the next hop refuses %d parts of a request: %s", outcome.rejected, outcome.rejection
            )

    def _tell_of_parts(self, size: int, verdict: Verdict) -> None:
        if not self._splits:
            self._splits = True
            logger.warning(
                "the next hop takes no request of %d bytes (%s): such requests are sent in parts", size, verdict.words
            )

    def _drop(self, count: int, why: str) -> None:
        self.totals.dropped += count
        self._tell("dropped", "requests are NOT forwarded, %d dropped until now: %s", self.totals.dropped, why)

    def _tell(self, kind: str, line: str, *values: object) -> None:
        """An error in the log, of each kind one in a while: counters have them all."""
        now = time.monotonic()
        if now - self._told.get(kind, float("-inf")) >= TELL_INTERVAL:
            self._told[kind] = now
            logger.error(line, *values)


@asynccontextmanager
async def forwarding(settings: Forwarding) -> AsyncIterator[Forwarder]:
    """Forwards while the context lasts; at its end everything accepted is on the disk or sent. Raises UserError."""
    async with hop(settings.endpoint, settings.headers, settings.compression) as next_hop:
        spool = Spool(settings.folder, settings.max_bytes, settings.max_files)
        forwarder = Forwarder(spool, next_hop)
        running = asyncio.create_task(forwarder.run())
        try:
            yield forwarder
        finally:
            await forwarder.end(running)
            spool.close()
