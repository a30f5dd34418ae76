"""An end to waiting, whatever it is that a piece of code waits for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final


class Deadline:
    """Ends the task's waiting inside the context after so many seconds, as the error that `late` makes.

    (`asyncio.timeout` is of Python 3.11, and `wait_for` makes a task for each call.)
    """

    def __init__(self, seconds: float, late: Callable[[], Exception]) -> None:
        self._seconds: Final = seconds
        self._error: Final = late
        self._late = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if not self._late:
            return
        others = sys.version_info >= (3, 11) and self._task.uncancel() > 0
        if isinstance(error, asyncio.CancelledError) and not others:
            raise self._error() from None

    def _end(self) -> None:
        self._late = True
        self._task.cancel()
