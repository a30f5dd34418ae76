"""Bounds the bytes between arrival and answer, of both protocols together."""

from __future__ import annotations

from types import TracebackType

from tallymark_collector.errors import Overloaded


class Admission:
    """Counts the bytes between arrival and answer; past the limit a request is refused, retryable."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self._limit = limit
        self._retry_after = retry_after
        self._bytes = 0

    @property
    def under_way(self) -> int:
        """Bytes that have arrived and are not answered."""
        return self._bytes

    def enter(self, size: int, own: int = 0) -> None:
        """Counts `size` more for a request that has `own` already. Raises Overloaded. A request larger than the whole
        limit is let in alone."""
        if self._bytes > own and self._bytes + size > self._limit:
            error = Overloaded(f"{self._bytes} bytes of requests are under way, at most {self._limit} are taken")
            error.retry_after = self._retry_after
            raise error
        self._bytes += size

    def leave(self, size: int) -> None:
        """The request has been answered."""
        self._bytes -= size


class Share:
    """What one request counts for, growing as its body arrives; nothing is counted once the context has ended."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._size = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self._size)
        self._size = 0

    def take(self, size: int) -> None:
        """Counts that many more bytes. Raises Overloaded."""
        self._admission.enter(size, self._size)
        self._size += size
