"""What arrives and is nobody's usage, by name: so that a person sees what a file of meters passes over."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Final

logger = logging.getLogger(__name__)

MAX_NAMES: Final = 1_000
"""Names that are counted by themselves, of each signal. Later ones are counted together."""
MAX_NAME: Final = 255
OTHERS: Final = "(other names)"
SHOWN: Final = 10


class Unmatched:
    """Counts since the process began. Of metrics: metrics in requests (of one that the file names, points); of traces:
    spans."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {"metrics": Counter(), "traces": Counter()}
        self._told = 0

    def add(self, signal: str, names: Mapping[str, int]) -> None:
        """Counts names of `metrics` or `traces`."""
        counts = self._counts[signal]
        for name, number in names.items():
            short = name[:MAX_NAME]
            counts[short if short in counts or len(counts) < MAX_NAMES else OTHERS] += number

    def top(self, signal: str, number: int = SHOWN) -> list[tuple[str, int]]:
        """The most frequent names."""
        return self._counts[signal].most_common(number)

    @property
    def total(self) -> int:
        """All of it."""
        return sum(sum(counts.values()) for counts in self._counts.values())

    def tell(self) -> None:
        """A line of the log, where anything is new."""
        if self.total == self._told:
            return
        self._told = self.total
        said = [
            f"{signal}: " + ", ".join(f"{name!r} {number:,}" for name, number in self.top(signal))
            for signal, counts in self._counts.items()
            if counts
        ]
        logger.info("not usage, passed over since the start: %s", "; ".join(said))
