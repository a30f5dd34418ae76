"""A collector small enough to trust, a service under a real server, and a runtime of each test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvicorn
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from tallymark import runtime
from tallymark.quantities import EXACT
from tallymark.runtime import Runtime
from tallymark.settings import Settings

SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"


class FakeCollector:
    """Takes metrics as bytes. `answer(n)` says for the n-th request, from 0: None to store and acknowledge, a status
    to refuse, or (status, "stored") to store it and lose the acknowledgement."""

    def __init__(self, answer: Callable[[int], Any] = lambda n: None, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.stored: list[bytes] = []
        self.metadata: list[dict[str, Any]] = []
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._server.start()

    def _export(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        number = len(self.requests)
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.answer(number)
        if answer is None or isinstance(answer, tuple):
            self.stored.append(request)
        if answer is not None:
            context.abort(answer[0] if isinstance(answer, tuple) else answer, "as the test wants it")
        return ExportMetricsServiceResponse().SerializeToString()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def points(self) -> dict[tuple[Any, ...], Decimal]:
        """Each stored point once: (producer, meter, unit, attributes, start, time) -> value. A point stored again
        must have the same value."""
        points: dict[tuple[Any, ...], Decimal] = {}
        for raw in self.stored:
            for resource in ExportMetricsServiceRequest.FromString(raw).resource_metrics:
                producer = {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"]
                for metric in resource.scope_metrics[0].metrics:
                    assert metric.sum.is_monotonic
                    assert metric.sum.aggregation_temporality == 1
                    for point in metric.sum.data_points:
                        attributes = tuple(sorted((a.key, a.value.SerializeToString()) for a in point.attributes))
                        key = (
                            producer,
                            metric.name,
                            metric.unit,
                            attributes,
                            point.start_time_unix_nano,
                            point.time_unix_nano,
                        )
                        kind = point.WhichOneof("value")
                        value = Decimal(point.as_int) if kind == "as_int" else Decimal(repr(point.as_double))
                        assert value > 0
                        assert point.start_time_unix_nano < point.time_unix_nano
                        assert points.setdefault(key, value) == value
        return points

    def totals(self) -> dict[str, Decimal]:
        totals: dict[str, Decimal] = {}
        for key, value in self.points().items():
            totals[key[1]] = EXACT.add(totals.get(key[1], Decimal(0)), value)
        return totals


@pytest.fixture
def start_collector() -> Iterator[Callable[..., FakeCollector]]:
    started: list[FakeCollector] = []

    def start(*args: Any, **kwargs: Any) -> FakeCollector:
        started.append(FakeCollector(*args, **kwargs))
        return started[-1]

    yield start
    for collector in started:
        collector.stop()


@pytest.fixture
def collector(start_collector: Callable[..., FakeCollector]) -> FakeCollector:
    return start_collector()


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes to the folder of whoever runs it."""
    monkeypatch.setenv("TALLYMARK_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def fresh() -> Iterator[Runtime]:
    """The whole process's usage goes to a runtime of this test alone."""
    with runtime.using(Runtime()) as own:
        yield own
        own.shutdown(0.2)


@pytest.fixture
def settings(state_dir: Path) -> Callable[..., Settings]:
    def make(endpoint: str, **kwargs: Any) -> Settings:
        given = {"endpoint": endpoint, "timeout_s": 0.5, "interval_s": 0.2, "state_dir": str(state_dir), **kwargs}
        return Settings(**given)

    return make


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Runs an ASGI application under uvicorn in a thread; gives its port."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any, **kwargs: Any) -> int:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", **kwargs)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return int(listener.getsockname()[1])

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def run_script(state_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python source in a process of its own, with nothing of OpenTelemetry in its environment but `env`."""

    def run(source: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                "TALLYMARK_TIMEOUT": "1",
                "TALLYMARK_STATE_DIR": str(state_dir),
                **env,
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run
