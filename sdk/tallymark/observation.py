"""How this process's delivery fares, for health checks and metrics of the service's own.

    from tallymark.observation import delivery_stats

`configure(mirror=True)` shows the same as OpenTelemetry instruments, `tallymark.sdk.*`: see `tallymark.state`.
"""

from __future__ import annotations

from tallymark import runtime


def delivery_stats() -> dict[str, int]:
    """What went other ways than it should in this process, all 0 where all is well: `in_memory` (times that the disk
    did not take usage), `rejected_points` (in dead-letter files), `held_back` (times that a refused request found these
    full, and stayed in the outbox), `refused` (recordings without a usable quantity). And `not_billed`, the calls that
    their meter's `billable` did not bill, which is as it should be."""
    return runtime.current().stats()
