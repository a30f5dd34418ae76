"""Usage that is told apart to the unit: every point has its own identity, and the totals are known beforehand.

A gateway stands in for clients: points wait in it until a request that holds them was acknowledged. Whatever was not
goes into other requests, in another order and other company; some of what was acknowledged goes out again.
"""

from __future__ import annotations

import random
import time
from typing import Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.delivery.contract.foreign import Foreign, ForeignTotals
from tests.delivery.contract.items import Item, request
from tests.delivery.contract.producer import CALLED, Producer
from tests.delivery.contract.sources import Counters, Levels, Source, Totals
from tests.delivery.contract.tally import Tally
from tests.support.usage import SECOND, key_values

ACCOUNTS: Final = 4


class Gateway:
    """Holds points until they are acknowledged. Those of one run have accounts and producers of the same names: their
    tenants are others."""

    def __init__(self, seed: int, run: str) -> None:
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.run = run
        self.accounts = [f"{run}-{i}" for i in range(ACCOUNTS)]
        began = time.time_ns() // SECOND * SECOND - 6 * 3600 * SECOND
        kinds = (Counters, Counters, Totals, Totals, Levels, Foreign, ForeignTotals, Producer)
        self.sources: list[Source] = [
            kind(f"{run}-{i}", random.Random(self.rng.random()), self.accounts, began, self.tally)
            for i, kind in enumerate(kinds)
        ]
        # Whose usage nobody may store: its tally is nobody's.
        self._stolen: list[Source] = [
            kind(f"{run}-thief", random.Random(self.rng.random()), [f"{run}-stolen"], began, Tally())
            for kind in (Counters, Levels, Foreign, Producer)
        ]
        self.waiting: list[Item] = []
        self.sent: list[Item] = []

    def use(self) -> None:
        """Some sources go on by an interval."""
        for source in self.rng.sample(self.sources, self.rng.randint(1, len(self.sources))):
            self.waiting += source.step()

    def end(self) -> None:
        """No more is used."""
        for source in self.sources:
            self.waiting += source.end()

    def batch(self, whole: bool = False) -> list[Item]:
        """What the next request holds: of what waits, out of order, and of what was acknowledged before."""
        self.rng.shuffle(self.waiting)
        held = list(self.waiting if whole else self.waiting[: self.rng.randint(1, len(self.waiting) or 1)])
        if self.sent and self.rng.random() < 0.3:
            held += self.rng.sample(self.sent, min(len(self.sent), self.rng.randint(1, 20)))
        self.rng.shuffle(held)
        return held

    def acknowledged(self, held: list[Item]) -> None:
        """A request that held these was."""
        arrived = {id(item) for item in held}
        self.sent += [item for item in self.waiting if id(item) in arrived]
        del self.sent[:-500]
        self.waiting = [item for item in self.waiting if id(item) not in arrived]

    def calls_behind(self) -> ExportTraceServiceRequest:
        """Spans of single calls, each with an identity of its own, which the producer counts."""
        whole = ExportTraceServiceRequest()
        spans = whole.resource_spans.add().scope_spans.add().spans
        producer = self.sources[-1]
        assert isinstance(producer, Producer)
        for _ in range(self.rng.randint(1, 5)):
            account = self.rng.choice(self.accounts)
            self.tally.calls[account] += 1
            producer.on_spans[account] += 1
            at = producer.at_ns
            spans.add(
                trace_id=self.rng.randbytes(16),
                span_id=self.rng.randbytes(8),
                name="call",
                start_time_unix_nano=at,
                end_time_unix_nano=at + 1000,
                attributes=key_values({"tallymark.account.id": account, f"tallymark.meter.{CALLED}": 1}),
            )
        return whole

    def stolen(self) -> ExportMetricsServiceRequest:
        """Usage with nothing wrong but who sends it."""
        return request([item for source in self._stolen for item in source.step()])
