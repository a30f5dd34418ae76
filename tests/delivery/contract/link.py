"""What stands between a collector and its database, and can fail: a Unix socket that passes bytes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Final

SOCKET: Final = ".s.PGSQL.5432"
KEEPALIVE_S: Final = 3.0
"""After which a client hears that a silent connection is none: as of TCP's keepalives, in the tempo of these runs."""


class Link:
    """Listens in a folder of its own, in a thread of its own; `close` ends both."""

    def __init__(self, folder: Path, target: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.silent = 0
        """Connections that were left half open."""
        self._target = target
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(60):
            raise TimeoutError("the link does not listen")

    def cut(self) -> None:
        """Every connection is reset."""
        self._loop.call_soon_threadsafe(self._cut)

    def fall_silent(self) -> None:
        """Every connection that is there stays open and carries nothing any more, as behind a firewall that has
        forgotten it; new ones work. The clients find out after a while, the server does not."""
        self._loop.call_soon_threadsafe(self._fall_silent)

    def bury(self) -> None:
        """Ends what was left half open, also at the server."""
        self._loop.call_soon_threadsafe(self._bury)

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
        self._forgotten: list[asyncio.StreamWriter] = []
        server = await asyncio.start_unix_server(self._connected, self.folder / SOCKET)
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cut()
        self._bury()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _cut(self) -> None:
        for pair in list(self._pairs.values()):
            for writer in pair:
                writer.transport.abort()

    def _bury(self) -> None:
        for writer in self._forgotten:
            writer.transport.abort()
        self._forgotten.clear()

    def _fall_silent(self) -> None:
        self.silent += len(self._pairs)
        for task, pair in list(self._pairs.items()):
            self._loop.call_later(KEEPALIVE_S, pair[0].transport.abort)
            # The server's side too: a session that holds locks must be found and ended by the server alone.
            self._forgotten.extend(pair)
            task.cancel()
        self._pairs.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, other = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._carry(reader, other, back, writer))
        self._pairs[task] = (writer, other)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if self._pairs.pop(task, None) is not None:
            writer.transport.abort()
            other.transport.abort()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        other: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        ways = [asyncio.ensure_future(_pass(reader, other)), asyncio.ensure_future(_pass(back, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
