"""What the repeating bytes of requests mean, within a limit."""

from __future__ import annotations

from collections.abc import Hashable


class Memory:
    """A dictionary that forgets everything at its limit, which costs time and changes nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[Hashable, object] = {}

    @property
    def size(self) -> int:
        """Entries now; never more than the limit."""
        return len(self._known)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def __getitem__(self, key: Hashable) -> object:
        return self._known[key]

    def __setitem__(self, key: Hashable, value: object) -> None:
        if len(self._known) >= self._limit:
            self._known.clear()
        self._known[key] = value
