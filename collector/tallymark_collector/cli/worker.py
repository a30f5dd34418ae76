"""A child of `tallymark serve --processes`: started by its parent alone, see `processes.workers`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import select
import signal
import sys
from typing import Any, Final

from tallymark_collector import application
from tallymark_collector.access import Authenticator
from tallymark_collector.cli import logs
from tallymark_collector.cli.redaction import redact
from tallymark_collector.errors import PermanentError, TransientError
from tallymark_collector.pipeline import Pipeline
from tallymark_collector.processes import collecting
from tallymark_collector.processes.workers import WRONG
from tallymark_collector.receivers.server import Server
from tallymark_collector.settings import Settings

COMMAND: Final = (sys.executable, "-m", "tallymark_collector.cli.worker")
_AWAY: Final = 3


def work(settings: Settings, how: logs.Logs) -> bytes:
    """What the parent tells a child. Through a pipe: arguments and variables can be seen by others."""
    return pickle.dumps((settings, how))


def main() -> int:
    """Takes requests until the parent says so, or is gone. Returns the exit status."""
    # A person's Ctrl-C comes to parent and children alike; the parent tells its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    text = sys.stdin.buffer.read(size)
    if len(text) < size or not size:
        sys.stderr.write("This is a part of `tallymark serve --processes`: start that.\n")
        return WRONG
    settings, how = pickle.loads(text)  # noqa: S301 - from the parent's pipe
    logs.start(how)
    collecting.seldom()
    try:
        asyncio.run(_take_requests(settings))
    except (PermanentError, TransientError) as error:
        _say({"failed": redact(str(error))})
        return WRONG if isinstance(error, PermanentError) else _AWAY
    return 0


async def _take_requests(settings: Settings) -> None:
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _parent_is_gone)

    async def ready(server: Server, _: Pipeline, _authenticator: Authenticator) -> None:
        state = server.readiness
        state.told = lambda: _say({"reason": state.reason})
        _say({"reason": state.reason, "admin_port": server.admin_port})

    await application.serve(settings, ready, keeps=False, load=_say_load)


def _parent_is_gone() -> None:
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    signal.raise_signal(signal.SIGTERM)


def _say_load(seconds: float) -> None:
    # A parent that does not listen must not hold up requests; it is told the whole sum again the next time.
    if select.select([], [sys.stdout.fileno()], [], 0)[1]:
        _say({"commit_seconds": seconds})


def _say(line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and so is soon this
        os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
