"""Warnings that cannot flood: one line per kind and minute, with the number held back since the last one."""

import logging
import math
import time
from typing import Final

logger: Final = logging.getLogger("tallymark")

REPORT_EVERY_S: Final = 60.0
MAX_KINDS: Final = 1000


class Reporter:
    """Writes to the logger `tallymark`; never raises, because it is called on the handler's path.

    There is no lock: a race between two threads can at worst print one line more, and a lock would have to be
    replaced in a forked child.
    """

    def __init__(self, every_s: float = REPORT_EVERY_S) -> None:
        self._every_s = every_s
        self._next: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Warn at most once in `every_s` seconds for this kind; `args` are formatted as in logging."""
        self._report(logging.WARNING, kind, message, args)

    def error(self, kind: str, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """The same at level ERROR, with the traceback of `exc_info` where it is given."""
        self._report(logging.ERROR, kind, message, args, exc_info)

    def silence(self, kind: str) -> None:
        """Never report this kind."""
        self._next[kind] = math.inf

    def _report(
        self, level: int, kind: str, message: str, args: tuple[object, ...], exc_info: BaseException | None = None
    ) -> None:
        try:
            now = time.monotonic()
            if now < self._next.get(kind, now):
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return
            if len(self._next) >= MAX_KINDS:
                self._next.clear()
                self._held_back.clear()
            self._next[kind] = now + self._every_s
            if held_back := self._held_back.pop(kind, 0):
                message += " (and %d more like it since the last line)"
                args = (*args, held_back)
            logger.log(level, message, *args, exc_info=exc_info)
        except Exception:  # noqa: S110 - a log handler that raises must not reach the caller's handler
            pass
