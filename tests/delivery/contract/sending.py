"""Gateways that deliver to collectors, any of them, and what an answer may be."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tests.delivery.contract.load import Gateway, request

METRICS: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
TRACES: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
CALL_S: Final = 3.0
"""How long a client waits for an answer."""

RETRYABLE: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""What a client sends again after (OTLP specification, "Failures"); any other status would lose the usage."""

_QUICK: Final = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    # Channels to one address share their connections otherwise, and with them each other's pauses.
    ("grpc.use_local_subchannel_pool", 1),
)


class Sender(threading.Thread):
    """One gateway at work: until it is told to finish, and then until all is acknowledged."""

    def __init__(self, gateway: Gateway, ports: Sequence[int], least: int) -> None:
        """`least` requests at the least are made of fresh usage."""
        super().__init__(daemon=True)
        self.gateway = gateway
        self.problems: list[str] = []
        self.answers: Counter[str] = Counter()
        self.finish = threading.Event()
        self.give_up = threading.Event()
        self._rng = random.Random(gateway.rng.random())
        self._least = least
        self._channels = [grpc.insecure_channel(f"127.0.0.1:{port}", options=_QUICK) for port in ports]
        self._pool = ThreadPoolExecutor(2)

    def run(self) -> None:
        """All of it."""
        try:
            made = 0
            while not self.give_up.is_set() and (made < self._least or not self.finish.is_set()):
                self.gateway.use()
                self._metrics()
                if self._rng.random() < 0.3:
                    self._until_acknowledged(TRACES, self.gateway.calls_behind().SerializeToString())
                made += 1
                time.sleep(self._rng.uniform(0, 0.02))
            while self.gateway.waiting and not self.give_up.is_set():
                self._metrics()
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        finally:
            self._pool.shutdown()
            for channel in self._channels:
                channel.close()

    def _metrics(self) -> None:
        """One request. What it held waits on if it failed, and will be in another one."""
        held = self.gateway.batch(whole=self.finish.is_set())
        body = request(held).SerializeToString()
        if self._rng.random() < 0.15:
            # A load balancer that answers the first request late and has sent it to another collector meanwhile.
            found = list(self._pool.map(lambda at: self._once(at, METRICS, body), range(len(self._channels))))
        else:
            found = [self._once(self._rng.randrange(len(self._channels)), METRICS, body)]
        if any(found):
            self.gateway.acknowledged(held)
        else:
            time.sleep(self._rng.uniform(0.01, 0.1))

    def _until_acknowledged(self, method: str, body: bytes) -> None:
        while not self.give_up.is_set() and not self._once(self._rng.randrange(len(self._channels)), method, body):
            time.sleep(self._rng.uniform(0.01, 0.1))

    def _once(self, at: int, method: str, body: bytes) -> bool:
        """True if it was acknowledged."""
        parse: Callable[[bytes], ExportMetricsServiceResponse | ExportTraceServiceResponse] = (
            ExportMetricsServiceResponse.FromString if method == METRICS else ExportTraceServiceResponse.FromString
        )
        try:
            answer = parse(self._channels[at].unary_unary(method)(body, timeout=CALL_S))
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            self.answers[code.name] += 1
            if code not in RETRYABLE:
                self.problems.append(f"{code.name}: {error.details()}")  # type: ignore[attr-defined]
            elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and not any(
                key == "google.rpc.retryinfo-bin"
                for key, _ in error.trailing_metadata() or ()  # type: ignore[attr-defined]
            ):
                self.problems.append("RESOURCE_EXHAUSTED without RetryInfo")
            return False
        self.answers["acknowledged"] += 1
        if answer.HasField("partial_success"):
            self.problems.append(f"refused: {answer.partial_success}")
        return True
