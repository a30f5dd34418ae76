"""Credentials from the database, so that neither many requests nor many guesses become load on it.

What was found is remembered for a short time, what was not found too, apart from the former, so that guesses push
nothing out. At most one query is under way; what is asked meanwhile waits and goes into the next one together, the
credentials that were good before first. For guesses there is a least time between queries. How many requests wait is
bounded, for all guesses together and for each credential that was good before: whoever comes then is told to come
again, since the credential may be good. So strangers hold no more than a little memory, and take no tenant's place.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from tallymark_collector.access.records import Credential
from tallymark_collector.errors import Overloaded

REMEMBERED_SECONDS: Final = 10.0
"""How long an answer counts. A credential that is revoked is refused this much later at the latest."""
MAX_REMEMBERED: Final = 10_000
"""Credentials that are remembered, and as many guesses."""
MAX_KEYS: Final = 100
"""In one query."""
GUESSING_INTERVAL: Final = 0.05
"""Least seconds between two queries for what nobody knows."""
MAX_WAITING: Final = 500
"""Requests that wait for an answer: with unknown credentials together, and with each that was good before. What has
arrived of them is no tenant's yet: 64 KiB of each over gRPC, at most twice as much over HTTP."""


class Directory(Protocol):
    """Where credentials are looked up: the database, or a test."""

    async def find(self, keys: Sequence[str]) -> Mapping[str, Credential]:
        """Those of the keys that are known, dead ones too. Raises TransientError."""
        ...

    async def any(self) -> bool:
        """True if a credential has ever been made. Raises TransientError."""
        ...


class _Remembered(NamedTuple):
    credential: Credential | None
    at: float


class LookUps:
    """Answers by key. One event loop owns it."""

    def __init__(
        self,
        directory: Directory,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        seconds: float = REMEMBERED_SECONDS,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._pause = pause
        self._seconds = seconds
        self._known: OrderedDict[str, _Remembered] = OrderedDict()
        self._guessed: OrderedDict[str, _Remembered] = OrderedDict()
        self._asked_again: dict[str, asyncio.Future[Credential | None]] = {}
        self._asked: dict[str, asyncio.Future[Credential | None]] = {}
        self._waiting: Counter[str | None] = Counter()
        self._guesses_from = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._any = False
        self._any_at = float("-inf")

    async def get(self, key: str) -> Credential | None:
        """The credential, at most `seconds` old, or None. Raises TransientError where that cannot be said now."""
        remembered = self._known.get(key) or self._guessed.get(key)
        if remembered is not None and self._clock() - remembered.at < self._seconds:
            return remembered.credential
        known = key in self._known
        who = key if known else None
        if self._waiting[who] >= MAX_WAITING:
            whose = "this credential" if known else "unknown credentials"
            raise Overloaded(f"{MAX_WAITING} requests with {whose} wait for it to be looked up: try again")
        waiting = self._asked_again if known else self._asked
        answer = waiting.get(key)
        if answer is None:
            answer = waiting[key] = asyncio.get_running_loop().create_future()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        self._waiting[who] += 1
        try:
            # Others wait for the same answer: that one of them hangs up must not take it from them.
            return await asyncio.shield(answer)
        finally:
            self._waiting[who] -= 1
            if not self._waiting[who]:
                del self._waiting[who]

    async def any(self) -> bool:
        """True if there are credentials, or were: a locked door is not opened by the last key's end. Raises
        TransientError."""
        if self._any or self._clock() - self._any_at < self._seconds:
            return self._any
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(_read)
        await asyncio.shield(self._looking)
        return self._any

    async def _look(self) -> None:
        at = self._clock()
        self._any = await self._directory.any()
        self._any_at = at

    async def _ask(self) -> None:
        while self._asked_again or self._asked:
            if not self._asked_again:
                left = self._guesses_from + GUESSING_INTERVAL - self._clock()
                if left > 0:
                    await self._pause(left)
                self._guesses_from = self._clock()
            taken: dict[str, asyncio.Future[Credential | None]] = {}
            for waiting in (self._asked_again, self._asked):
                for key in [*waiting][: MAX_KEYS - len(taken)]:
                    taken[key] = waiting.pop(key)
                if taken and waiting is self._asked_again:
                    break  # these are not kept waiting by guesses, nor do guesses come along with them
            await self._answer(taken)

    async def _answer(self, taken: Mapping[str, asyncio.Future[Credential | None]]) -> None:
        at = self._clock()  # before the query: what is revoked after it began must not count for longer
        try:
            found = await self._directory.find([*taken])
        except asyncio.CancelledError:
            for answer in taken.values():
                answer.cancel()
            raise
        except Exception as error:
            for answer in taken.values():
                answer.set_exception(error)
                _read(answer)
            return
        for key, answer in taken.items():
            credential = found.get(key)
            self._remember(key, _Remembered(credential, at))
            answer.set_result(credential)

    def _remember(self, key: str, remembered: _Remembered) -> None:
        where, other = self._known, self._guessed
        if remembered.credential is None:
            where, other = other, where
        other.pop(key, None)
        where[key] = remembered
        where.move_to_end(key)
        if len(where) > MAX_REMEMBERED:
            where.popitem(last=False)


def _read(answer: asyncio.Future[Any]) -> None:
    """Whoever asked may have hung up; an error that nobody reads would be logged as a bug."""
    if not answer.cancelled():
        answer.exception()
