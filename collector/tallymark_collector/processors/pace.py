"""When work in pieces rests."""

from __future__ import annotations


class Pace:
    """Counts what has been done since the last rest."""

    def __init__(self, most: int) -> None:
        """`most`: after so much it is time to rest."""
        self._most = most
        self._left = most

    def full(self, done: int) -> bool:
        """Counts it; True where it is time to rest, and counting begins anew."""
        self._left -= done
        if self._left > 0:
            return False
        self._left = self._most
        return True
