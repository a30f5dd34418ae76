"""OpenTelemetry's Collector as a gateway: it batches, and sends with several consumers, so out of order."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.interop.clients import command

PATIENCE_S = 30
READY = "Everything is ready"
EXPORTERS = {
    "grpc": {"otlp": {"tls": {"insecure": True}}},
    "http/protobuf": {"otlphttp": {"encoding": "proto"}},
    "http/json": {"otlphttp": {"encoding": "json"}},
}
"""Protocol to the exporter that speaks it."""


@dataclass(frozen=True)
class Gateway:
    """Where it listens."""

    grpc_port: int
    http_port: int
    version: str

    def port_of(self, protocol: str) -> int:
        return self.grpc_port if protocol == "grpc" else self.http_port


@contextmanager
def running(folder: Path, protocol: str, target: int) -> Iterator[Gateway]:
    """A gateway that sends to the target's port. Raises NotBuiltError."""
    program = command("gateway")[0]
    ports = free_port(), free_port()
    settings = folder / "gateway.yaml"
    settings.write_text(json.dumps(configuration(protocol, target, *ports)))  # JSON is YAML
    log = folder / "gateway.log"
    with log.open("w") as out:
        process = subprocess.Popen([program, "--config", str(settings)], stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while READY not in log.read_text():
            assert process.poll() is None, f"the gateway ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the gateway is not ready:\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
        yield Gateway(*ports, version=version(program))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
        print(log.read_text()[-3000:])


def configuration(protocol: str, target: int, grpc_port: int, http_port: int) -> dict[str, object]:
    """The settings that docs/clients.md shows, with delays for a test."""
    ((kind, own),) = EXPORTERS[protocol].items()
    exporter = {
        **own,
        "endpoint": f"127.0.0.1:{target}" if kind == "otlp" else f"http://127.0.0.1:{target}",
        "sending_queue": {"enabled": True, "num_consumers": 10, "queue_size": 1000},
        "retry_on_failure": {"enabled": True, "initial_interval": "100ms", "max_interval": "1s"},
    }
    ports = {"grpc": grpc_port, "http": http_port}
    receiver = {"protocols": {name: {"endpoint": f"127.0.0.1:{port}"} for name, port in ports.items()}}
    pipeline = {"receivers": ["otlp"], "processors": ["batch"], "exporters": [kind]}
    return {
        "receivers": {"otlp": receiver},
        # Small, so that there are many.
        "processors": {"batch": {"timeout": "50ms", "send_batch_size": 10, "send_batch_max_size": 10}},
        "exporters": {kind: exporter},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"metrics": pipeline, "traces": pipeline},
        },
    }


def version(program: str) -> str:
    """The version of the Collector's modules that the program was made from."""
    listing = subprocess.run(["go", "version", "-m", program], capture_output=True, text=True, check=True).stdout
    return next(line.split()[2] for line in listing.splitlines() if "go.opentelemetry.io/collector/otelcol" in line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
