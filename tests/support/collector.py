"""A collector as a process of its own, to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc


class Collector:
    """A collector process that can be killed and started again on its ports."""

    def __init__(self, dsn: str, *more: str) -> None:
        """`more` are further arguments of `serve`."""
        self.dsn = dsn
        self.more = more
        self.port = 0
        self.http_port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["serve", "--database", self.dsn, "--port", str(self.port), "--json"]
        arguments += ["--http-port", str(self.http_port), *self.more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tallymark_collector", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        self.port, self.http_port = ready["port"], ready["http_port"]

    def send(self, body: bytes) -> None:
        """Sends a metrics request and waits for its answer."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")(body, timeout=30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(dsn: str, *more: str) -> Iterator[Collector]:
    collector = Collector(dsn, *more)
    collector.start()
    try:
        yield collector
    finally:
        collector.kill()
