"""Services under the real `opentelemetry-instrument`, in processes of their own."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from tests.sdk.fake_collector import FakeCollector

PATIENCE_S = 60.0
ROOT = Path(__file__).parents[3]
COMMAND = Path(sys.executable).parent / "opentelemetry-instrument"

Rows = dict[tuple[str | None, str, str | None, int | None], int]
"""(account, meter, route, status) -> quantity"""


@dataclass
class Service:
    port: int
    log: Path

    def logged(self) -> str:
        return self.log.read_text()


def check_installed() -> None:
    """The command finds entry points in what is installed, not in the sources."""
    points = importlib.metadata.entry_points(group="opentelemetry_instrumentor")
    assert "tallymark" in points.names, "the installed tallymark is older than its pyproject: pip install -e '.[dev]'"
    assert COMMAND.exists(), f"{COMMAND} is missing: pip install -e '.[dev]'"


def environment(folder: Path, **env: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(ROOT / "sdk"), str(ROOT / "collector")]),
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "shop",
        "TALLYMARK_STATE_DIR": str(folder / "state"),
        "TALLYMARK_EXPORT_INTERVAL": "0.2",
        **env,
    }


@contextmanager
def instrumented(folder: Path, sources: dict[str, str], *arguments: str, **env: str) -> Iterator[Service]:
    """`opentelemetry-instrument python ARGUMENTS` in `folder`, with "{port}" filled in; it answers when the block
    begins, and has ended when the block has."""
    check_installed()
    for name, source in sources.items():
        (folder / name).write_text(textwrap.dedent(source))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [str(COMMAND), sys.executable, *(argument.format(port=port) for argument in arguments)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment(folder, **env), stdout=out, stderr=out)
    try:
        _wait(lambda: process.poll() is not None or _listens(port), log)
        assert process.poll() is None, log.read_text()
        yield Service(port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def rows(collector: FakeCollector) -> Rows:
    found: Counter[tuple[str | None, str, str | None, int | None]] = Counter()
    for (_, meter, unit, attributes, _, _), value in collector.points().items():
        assert unit == "{request}"
        names = {key: AnyValue.FromString(raw) for key, raw in attributes}
        account, route, status = (
            names.get(name) for name in ("tallymark.account.id", "http.route", "http.response.status_code")
        )
        assert value == int(value)
        found[
            account.string_value if account is not None else None,
            meter,
            route.string_value if route is not None else None,
            status.int_value if status is not None else None,
        ] += int(value)
    return dict(found)


def wait_for(collector: FakeCollector, want: int, service: Service) -> None:
    """Until as much has arrived as is wanted; what is too much shows when the service has ended."""
    _wait(lambda: sum(collector.totals().values()) >= want, service.log)


def _wait(ready: Callable[[], bool], log: Path) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
