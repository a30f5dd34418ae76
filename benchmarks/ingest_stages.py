"""Where the collector's time goes: CPU of each stage between the bytes and COPY, without a database."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

from rich.table import Table

from benchmarks import ingest_load as load
from tallymark_collector import wire
from tallymark_collector.model import Batch
from tallymark_collector.processes import collecting
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.store import rows, writer

SIZE: Final = 8000
ROUNDS: Final = 15


def table() -> Table:
    """Microseconds of CPU for a point, by stage."""
    collecting.seldom()  # as a collector does
    body = load.requests(SIZE)[0]
    cache = StreamCache()

    def decoded() -> Batch:
        return Batch(points=decode_metrics("default", body, cache, TimeLimits(), time.time_ns()).points)

    batch = decoded()
    encoded = writer.encode(batch)
    stages: dict[str, Callable[[], object]] = {
        "decode: bytes to points of known streams": decoded,
        "   of which protobuf's parsing": lambda: wire.parse_metrics(body),
        "encode: rows, streams, marks": lambda: writer.encode(batch),
        "   of which the rows": lambda: rows.point_rows(batch.points),
        "   of which the marks": lambda: rows.mark_rows(batch.points),
        "sort the rows by their key": lambda: sorted(encoded.lines),
    }
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(ROUNDS):
        for name, work in stages.items():
            start = time.process_time()
            work()
            taken[name].append((time.process_time() - start) / SIZE * 1e6)
    found = Table(title=f"CPU by stage, {SIZE:,} points a request, median of {ROUNDS}")
    found.add_column("stage")
    found.add_column("us/point", justify="right")
    for name, seconds in taken.items():
        found.add_row(name, f"{statistics.median(seconds):.2f}")
    return found
