"""Bounds the bytes between arrival and answer, of both protocols together, and shares them out between tenants.

No I/O and no waiting in here. Where there is room, anybody may have it: one tenant alone may have all. When a request
finds no room, whoever holds the most gives way, newest request first, as long as it holds more than the one that asks
would hold then; where nobody does, the one that asks is refused. From this follows what is promised:

- The bytes that are counted never exceed the limit; a request larger than all of it is let in where it is alone.
- With n tenants under way, the one that asks among them, a tenant that stays within limit / n is never refused and
  never gives way, whatever the others hold and however they came to it: while there is no room for it, another one
  holds more than that; and who gives way holds more than that.
- Nobody's request gives way to a tenant that would then hold as much or more.

Who gives way is ended where it waits: for the rest of its body, for its turn to be decoded, or for a commit. It is
answered as overloaded, to be sent again, and counted under `leaving` until it has gone, which is at once but for JSON
that a thread is converting, at most one a thread. What a transaction under way writes then is written, and the
retry will be a duplicate.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final

from tallymark_collector.errors import Overloaded


class Admission:
    """Counts the bytes between arrival and answer by tenant; past the limit a request is refused, retryable."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self.leaving = 0
        """Bytes of requests that have given way and have not gone yet."""
        self.displaced = 0
        """Requests that gave way, since the start."""
        self._limit: Final = limit
        self._retry_after: Final = retry_after
        self._bytes = 0
        self._held: dict[str, int] = {}
        self._shares: dict[str, dict[Share, None]] = {}

    @property
    def under_way(self) -> int:
        """Bytes that have arrived and are not answered."""
        return self._bytes + self.leaving

    def held(self, tenant: str) -> int:
        """The same of one tenant, less what has given way."""
        return self._held.get(tenant, 0)

    def enter(self, share: Share, size: int) -> None:
        """Counts `size` more for a request. Raises Overloaded."""
        if not size:
            return
        self._make_room(share, size)
        self._shares.setdefault(share.tenant, {})[share] = None
        self._held[share.tenant] = self.held(share.tenant) + size
        self._bytes += size

    def _make_room(self, share: Share, size: int) -> None:
        """Who has to go is found before anyone goes, so that a refusal costs nobody's place."""
        excess = self._bytes + size - self._limit
        if excess <= 0 or self._bytes == share.size:
            return
        wanted = self.held(share.tenant) + size
        held = {tenant: bytes_ for tenant, bytes_ in self._held.items() if tenant != share.tenant}
        newest: dict[str, list[Share]] = {}
        leaving: list[Share] = []
        while excess > 0:
            most = max(held, key=held.__getitem__, default=share.tenant)
            if held.get(most, 0) <= wanted:
                raise self.refusal(f"{self._bytes} bytes of requests are under way, at most {self._limit} are taken")
            gone = newest.setdefault(most, list(self._shares[most])).pop()
            leaving.append(gone)
            excess -= gone.size
            held[most] -= gone.size
        for gone in leaving:
            self._forget(gone)
            self.leaving += gone.size
            self.displaced += 1
            gone.displace()

    def leave(self, share: Share) -> None:
        """The request has been answered."""
        if share.displaced:
            self.leaving -= share.size
        elif share.size:
            self._forget(share)

    def _forget(self, share: Share) -> None:
        tenant = share.tenant
        self._bytes -= share.size
        self._held[tenant] -= share.size
        del self._shares[tenant][share]
        if not self._shares[tenant]:
            del self._shares[tenant]
            del self._held[tenant]

    def refusal(self, why: str) -> Overloaded:
        """What a client is told."""
        error = Overloaded(why)
        error.retry_after = self._retry_after
        return error


class Share:
    """What one request counts for, growing as its body arrives; nothing is counted once the context has ended.

    The context is one task's: a request that has to give way is cancelled, and the context's end makes it Overloaded.
    """

    def __init__(self, admission: Admission, tenant: str, give_way: Callable[[], object] | None = None) -> None:
        """`give_way` is called where the request has to go; without it the task of the context is cancelled."""
        self.tenant: Final = tenant
        self.size = 0
        """Bytes that are counted."""
        self.displaced = False
        """True once it has given way."""
        self._admission = admission
        self._give_way = give_way
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Share:
        if self._give_way is None:
            self._task = asyncio.current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self)
        self.size = 0
        # Where the client hung up as well, there is nobody to be told.
        if isinstance(error, asyncio.CancelledError) and self.displaced and not self._cancelled_by_others():
            raise self._gone() from None

    def take(self, size: int) -> None:
        """Counts that many more bytes. Raises Overloaded."""
        if self.displaced:  # before Python 3.12 a cancellation that comes as `wait_for` ends is lost
            raise self._gone()
        self._admission.enter(self, size)
        self.size += size

    def displace(self) -> None:
        """Has the request go: another tenant, which holds less, needs its room."""
        self.displaced = True
        if self._give_way is not None:
            self._give_way()
        elif self._task is not None:
            self._task.cancel()

    def _gone(self) -> Overloaded:
        return self._admission.refusal("another tenant, which has fewer bytes under way, needed the room")

    def _cancelled_by_others(self) -> bool:
        if sys.version_info < (3, 11) or self._task is None:
            return False  # nobody can tell
        return self._task.uncancel() > 0
