"""What the repeating bytes of requests mean, within limits."""

from __future__ import annotations

from tallymark_collector.processors.streams import DECODED, REMEMBERED


class Memory:
    """A dictionary that forgets everything at its limits, which costs time and changes nothing. What an entry takes is
    taken to be `REMEMBERED` bytes, and `DECODED` times the texts and bytes of its key."""

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._known: dict[tuple[object, ...], object] = {}
        self._bytes = 0

    @property
    def size(self) -> int:
        """Entries now; never more than the limit."""
        return len(self._known)

    @property
    def weight(self) -> int:
        """About what they take in memory; more than the limit only by what came last."""
        return self._bytes

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple[object, ...]) -> object:
        return self._known[key]

    def __setitem__(self, key: tuple[object, ...], value: object) -> None:
        size = REMEMBERED + DECODED * sum(len(part) for part in key if isinstance(part, (bytes, str)))
        if len(self._known) >= self._limit or self._bytes + size > self._limit_bytes:
            self._known.clear()
            self._bytes = 0
        self._known[key] = value
        self._bytes += size
