"""Long work of the event loop in pieces, so that it never holds up the others for long.

Such work is a generator that yields where it may rest and returns its result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


async def resting(work: Generator[None, None, T]) -> T:
    """The work's result; others get their turn at each rest."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.sleep(0)
