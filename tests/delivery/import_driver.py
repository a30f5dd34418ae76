"""Runs imports in processes that are killed: `python -m tests.delivery.import_driver DSN FOLDER SEED RUNS`.

Each run imports FOLDER/access.log under a source of its own. Its process is killed again and again, from outside after
some time or by itself at a chosen step, then left to finish. Prints one JSON line for each run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tallymark_collector.imports.importer import Watching, run
from tallymark_collector.imports.summary import Summary
from tallymark_collector.store import Store
from tests.support.logs import request

KILLS = 4
STEPS = ("before the write", "in the transaction", "after the commit")


class Dying:
    """A store in which the process kills itself at the given step of the given write."""

    def __init__(self, store: Store, write: int, step: str) -> None:
        self._store, self._write, self._step = store, write, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, batch: Any, beside: Any) -> Any:
        self._write -= 1
        self._die("before the write")

        async def watched(connection: Any) -> None:
            await beside(connection)
            self._die("in the transaction")

        result = await self._store.write(batch, watched)
        self._die("after the commit")
        return result

    def _die(self, step: str) -> None:
        if self._write == 0 and self._step == step:
            os.kill(os.getpid(), signal.SIGKILL)


async def _import(
    dsn: str, log: Path, source: str, rejects: Path, piece: int, death: tuple[int, str] | None
) -> Summary:
    store = Store(dsn)
    await store.open()
    try:
        found: Any = store if death is None else Dying(store, *death)
        wanted = request(source, piece_lines=piece, rejects_file=rejects, again=True)
        return await run(found, wanted, [str(log)], Watching())
    finally:
        await store.close()


@contextlib.contextmanager
def child(*arguments: Any) -> Iterator[int]:
    """A process that imports and exits."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            asyncio.run(_import(*arguments))
            status = 0
        finally:
            os._exit(status)
    yield pid


def main(dsn: str, folder: Path, seed: int, runs: int) -> None:
    warnings.simplefilter("ignore")
    log = folder / "access.log"
    for number in range(runs):
        rng = Random(f"{seed} {number}")
        piece, source, rejects = rng.choice([7, 40, 150]), f"run {number}", folder / f"{number}.rejects"
        deaths = []
        for _ in range(rng.randint(1, KILLS)):
            if rng.random() < 0.5:
                death, wait = (rng.randint(1, 4), rng.choice(STEPS)), 60.0
            else:
                death, wait = None, rng.uniform(0.02, 0.4)
            with child(dsn, log, source, rejects, piece, death) as pid:
                deadline = time.monotonic() + wait
                while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
                    time.sleep(0.002)
                if not ended[0]:
                    os.kill(pid, signal.SIGKILL)
                    ended = os.waitpid(pid, 0)
            deaths.append((death or round(wait, 3), os.waitstatus_to_exitcode(ended[1])))
        with child(dsn, log, source, rejects, piece, None) as pid:
            last = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"run": number, "piece": piece, "deaths": deaths, "last": last}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
