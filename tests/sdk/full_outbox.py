"""What the tests of merging share: processes with many intervals, and what their merging must keep."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

from tallymark.folder import PARCEL
from tests.sdk.dying_process import Process, Stored

TENTHS = Decimal("0.1")


def files(place: Path, kind: str = PARCEL) -> list[Path]:
    return sorted(path for path in place.rglob(f"*{kind}"))


def bytes_of(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def cuts(process: Process, count: int, accounts: int = 3) -> None:
    for _ in range(count):
        for n in range(accounts):
            process.add(TENTHS, f"account-{n}")
        process.cut()


def check_intervals(collector: Stored) -> None:
    """No two points of a stream overlap."""
    of_stream = defaultdict(list)
    for producer, meter, unit, attributes, start, end in collector.points():
        of_stream[producer, meter, unit, attributes].append((start, end))
    for intervals in of_stream.values():
        for (_, end), (start, _) in pairwise(sorted(intervals)):
            assert end <= start
