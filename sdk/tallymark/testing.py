"""For tests of services: see what was recorded, without a collector.

with capture_usage() as usage:
    client.post("/v1/images", ...)
assert usage.total("images", account="acme") == 3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal

from tallymark import runtime
from tallymark.dimensions import Value
from tallymark.runtime import Runtime
from tallymark.streams import attributes_of


@dataclass(frozen=True)
class Usage:
    """The sum of one stream. `attributes` are those on the wire, with account and plan."""

    meter: str
    unit: str
    account: str | None
    plan: str | None
    attributes: Mapping[str, Value]
    quantity: int | Decimal


class Captured:
    """What has been recorded since the block began. It may be read inside the block and after it."""

    def __init__(self, of: Runtime) -> None:
        self._runtime = of

    def __iter__(self) -> Iterator[Usage]:
        for stream, quantity in self._runtime.recorder.sums().items():
            yield Usage(stream.meter, stream.unit, stream.account, stream.plan, attributes_of(stream), quantity)

    def total(self, meter: str, **only: str | None) -> int | Decimal:
        """The exact sum of a meter; `account=` and `plan=` pick out those alone (None: those without)."""
        quantities = [
            usage.quantity
            for usage in self
            if usage.meter == meter and all(getattr(usage, field) == value for field, value in only.items())
        ]
        return sum(quantities, 0)

    def refused(self) -> dict[str, int]:
        """Recordings refused for their quantity, by meter."""
        return self._runtime.recorder.refused()

    def not_billed(self) -> dict[str, int]:
        """Calls that their meter's `billable` did not bill, by meter."""
        return self._runtime.recorder.not_billed()


def delivery_stats() -> dict[str, int]:
    """What went other ways than it should in this process, all 0 where all is well: `in_memory` (times that the disk
    did not take usage), `rejected_points` (in dead-letter files), `refused` (recordings without a usable quantity).
    And `not_billed`, the calls that their meter's `billable` did not bill, which is as it should be."""
    return runtime.current().stats()


@contextmanager
def capture_usage() -> Iterator[Captured]:
    """Keep the whole process's usage out of the exporter inside the block, and show it."""
    capturing = Runtime(meters=runtime.current().meters)
    capturing.enabled = True
    capturing.reporter.silence("unconfigured")
    with runtime.using(capturing):
        yield Captured(capturing)
