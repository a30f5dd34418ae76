"""Work beside the handlers that lets them run.

The interpreter's lock changes hands every 5 ms when a thread only computes; a handler that waits for it would take that
much longer. So what goes through all streams rests after each bit of work, and keeps what it makes out of the garbage
collector's sight: a collection of 100,000 objects stops every thread for 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

REST_S: Final = 0.000_05
"""Long enough for a waiting thread to wake up and take the lock; a sleep of 0 takes it back at once."""


def restful(items: Iterable[T], every: int) -> Iterator[T]:
    """The same items; after each `every` of them, other threads run."""
    left = every
    for item in items:
        yield item
        left -= 1
        if not left:
            time.sleep(REST_S)
            left = every


def drop(table: dict[Any, Any], every: int = 2_000) -> None:
    """Empties a large dictionary step by step: let go of at once, its contents are freed in one go."""
    while table:
        for _ in range(min(every, len(table))):
            table.popitem()
        time.sleep(REST_S)
