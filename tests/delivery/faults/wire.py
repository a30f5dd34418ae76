"""The wire between producers and a collector, which can fail: a proxy that knows HTTP/2's frames and nothing else.

`away`: nobody is reached. For each answer of the collector, by chance: `lost` closes the connection instead of it,
after the collector has committed; `half` does so in the midst of it; `slow` keeps it back for longer than a client
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from typing import Final

_FRAME: Final = 9
_DATA, _HEADERS = 0, 1


class Wire:
    """Listens on a port of its own, in a thread of its own; `close` ends both."""

    def __init__(self, target: int, seed: int, slow_s: float) -> None:
        self.chances: dict[str, float] = {}
        self.away = False
        self.seen: Counter[str] = Counter()
        self.port = 0
        self._target = target
        self._slow_s = slow_s
        self._rng = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(60):
            raise TimeoutError("the wire does not listen")

    def go_away(self, away: bool) -> None:
        """Cuts all connections and refuses new ones, or comes back."""
        self.away = away
        if away:
            self._loop.call_soon_threadsafe(self._cut_all)

    def close(self) -> None:
        """Cuts all connections and stops listening."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cut_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _cut_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        try:
            if self.away:
                self.seen["away"] += 1
                return
            back, other = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(other)
            forth = asyncio.create_task(self._forward(reader, other))
            try:
                await self._answers(back, writer)
            finally:
                forth.cancel()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one of the two is gone, or the wire is closed
        finally:
            for one in filter(None, (writer, other)):
                self._writers.discard(one)
                one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Frame by frame; the first of an answer decides what becomes of it."""
        decided: set[int] = set()
        while True:
            head = await reader.readexactly(_FRAME)
            frame = head + await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, stream = head[3], int.from_bytes(head[5:], "big")
            if stream and kind in (_DATA, _HEADERS) and stream not in decided:
                decided.add(stream)
                fate = self._fate()
                self.seen[fate] += 1
                if fate == "lost":
                    return
                if fate == "half":
                    rest = await reader.readexactly(_FRAME)
                    cut = frame + rest
                    writer.write(cut[: self._rng.randrange(1, len(cut))])
                    await writer.drain()
                    writer.close()
                    await asyncio.sleep(0.01)
                    return
                if fate == "slow":
                    await asyncio.sleep(self._slow_s)
            writer.write(frame)
            await writer.drain()

    def _fate(self) -> str:
        roll = self._rng.random()
        for fate, chance in self.chances.items():
            roll -= chance
            if roll < 0:
                return fate
        return "answered"
