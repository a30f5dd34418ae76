"""Work in pieces, done at once: for whoever has no others to let have their turn."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def at_once(work: Generator[None, None, T]) -> T:
    """The work's result, without a rest."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
