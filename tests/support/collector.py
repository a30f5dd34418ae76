"""A collector as a process of its own, to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import psutil


class Collector:
    """A collector process that can be killed and started again on its ports."""

    def __init__(self, dsn: str, *more: str, log: Path | None = None) -> None:
        """`more` are further arguments of `serve`; what it writes to stderr is added to the file `log`."""
        self.dsn = dsn
        self.more = more
        self.log = log
        self.port = 0
        self.http_port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["serve", "--database", self.dsn, "--port", str(self.port), "--json"]
        arguments += ["--http-port", str(self.http_port), *self.more]
        with ExitStack() as stack:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tallymark_collector", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if self.log is None else stack.enter_context(self.log.open("ab")),
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
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def workers(self) -> list[psutil.Process]:
        """The processes of it beside the first."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def kill_all(self) -> None:
        """Every process of it, which leaves none the time to see the others go."""
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self.kill()


@contextmanager
def running(dsn: str, *more: str, log: Path | None = None) -> Iterator[Collector]:
    collector = Collector(dsn, *more, log=log)
    collector.start()
    try:
        yield collector
    finally:
        collector.kill()
