"""What becomes of a request on its way to the collector, by a plan that a seed repeats."""

from __future__ import annotations

import enum
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence


class Fate(enum.Enum):
    """One request's."""

    PASSED = "passed"
    REFUSED = "refused"
    """UNAVAILABLE or 503; nothing reached the collector."""
    LOST = "acknowledgement lost"
    """UNAVAILABLE or 503, after the collector has committed."""
    CUT = "connection cut before"
    """The connection ends without an answer; nothing reached the collector."""
    CUT_AFTER = "connection cut after"
    """The connection ends without an answer, after the collector has committed."""
    LATE = "late"
    """Kept back, so that others overtake it."""


FAULTS = (Fate.REFUSED, Fate.LOST, Fate.CUT, Fate.CUT_AFTER)


class Seeded:
    """Fates by chance. The same body fails `most` times at most: a client gives up after some attempts, and how many
    is not what is tested here."""

    def __init__(self, seed: int, chances: Mapping[Fate, float], most: int = 2) -> None:
        self.seen: Counter[Fate] = Counter()
        self._rng = random.Random(seed)
        # Of its own: who asks when is not repeated by the seed.
        self._others = random.Random(seed)
        self._chances = dict(chances)
        self._most = most
        self._failed: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def of(self, signal: str, body: bytes) -> Fate:
        """What becomes of this request, this time."""
        del signal
        with self._lock:
            fate = Fate.PASSED
            roll = self._rng.random()
            for candidate, chance in self._chances.items():
                roll -= chance
                if roll < 0:
                    fate = candidate
                    break
            if fate in FAULTS:
                self._failed[body] += 1
                if self._failed[body] > self._most:
                    fate = Fate.PASSED
            self.seen[fate] += 1
            return fate

    def delay(self) -> float:
        """Seconds that a late request is kept back."""
        with self._lock:
            return self._others.uniform(0.05, 0.5)

    def says_when(self) -> bool:
        """True if a refusal names the time to wait (none)."""
        with self._lock:
            return self._others.random() < 0.5


class Scripted(Seeded):
    """The first requests of metrics meet these fates, one each, and all others pass."""

    def __init__(self, *script: Fate) -> None:
        super().__init__(0, {})
        self._script: Sequence[Fate] = script
        self._at = 0

    def of(self, signal: str, body: bytes) -> Fate:
        with self._lock:
            fate = Fate.PASSED
            if signal == "metrics" and self._at < len(self._script):
                fate = self._script[self._at]
                self._at += 1
            self.seen[fate] += 1
            return fate
