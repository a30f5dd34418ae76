"""Children of the demo: output in a file, waited for until they are ready, stopped in order, never left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

READY_WITHIN: Final = 60.0
"""Seconds for a child to become ready: a database is made on a machine that may be busy."""
STOPPED_WITHIN: Final = 30.0
"""Seconds for a child to finish what it has; then it is killed."""
LAST_LINES: Final = 20

_LOOK_EVERY: Final = 0.05


class ChildError(Exception):
    """A child did not do what it was started for; the text has the last lines of its log."""


class Child:
    """A process with a log. Not in our process group, so that Ctrl-C reaches us alone and we stop it in order."""

    def __init__(self, name: str, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - arguments of ours
                arguments,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_for(self, pattern: str, timeout: float = READY_WITHIN) -> re.Match[str]:
        """The first match in the log. Raises ChildError when the child ends or says nothing like it in time."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self._process.poll()  # before the log is read: its last words count
            if found := re.search(pattern, self._output(), re.MULTILINE):
                return found
            if ended is not None:
                raise ChildError(f"the {self.name} ended with status {ended} before it was ready\n{self.last_lines()}")
            if time.monotonic() > deadline:
                raise ChildError(f"the {self.name} was not ready within {timeout:g} s\n{self.last_lines()}")
            time.sleep(_LOOK_EVERY)

    def check(self) -> None:
        """Raises ChildError when the child has ended."""
        if (ended := self._process.poll()) is not None:
            raise ChildError(f"the {self.name} ended with status {ended}\n{self.last_lines()}")

    def stop(self, timeout: float = STOPPED_WITHIN) -> None:
        """SIGTERM, and wait for the end. Again: nothing happens. Raises ChildError when it had to be killed."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ChildError(f"the {self.name} did not stop within {timeout:g} s\n{self.last_lines()}") from None
        except BaseException:
            self.kill()  # a second Ctrl-C: no more patience
            raise

    def kill(self) -> None:
        """SIGKILL to the child and what it started; the last resort."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def last_lines(self) -> str:
        """The end of the log, with its path."""
        return "\n".join([f"--- the end of {self.log}:", *self._output().splitlines()[-LAST_LINES:]])

    def _output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def clean_environment(**own: str) -> dict[str, str]:
    """This process's environment without what would send usage elsewhere, or nowhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TALLYMARK_"))}
    # gRPC would go through a proxy to its own machine.
    return {**kept, "no_grpc_proxy": "127.0.0.1", "PYTHONUNBUFFERED": "1", **own}


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that `finally` stops the children."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
