"""How often CPython looks for cycles of objects that nobody needs, in a process that takes requests.

It does so after every 700 new containers that are still there (2,000 in later versions), and each point of a request is
such a container for as long as the request waits: a third of a collector's time went into looking through points that
were needed still (benchmarks, `ingest`). What requests leave behind is free without a search, also where they fail
(`tests/collector/receivers/test_left_behind.py`), so a search may be seldom.
"""

from __future__ import annotations

import gc
from typing import Final

NEW: Final = 20_000
"""Containers; two or three requests of 8,000 points."""
YOUNGER: Final = 20
"""Searches among the new before one among those that have outlived some, and again for the oldest."""


def seldom() -> None:
    """Has this process search for cycles after `NEW` containers."""
    gc.set_threshold(NEW, YOUNGER, YOUNGER)
