"""A collector, a service under a real server, and a runtime of each test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.settings import Settings
from tests.sdk.fake_collector import FakeCollector


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
    with runtime.using(runtime.new_runtime()) as own:
        yield own
        own.shutdown(0.2)


@pytest.fixture
def settings(state_dir: Path) -> Callable[..., Settings]:
    def make(endpoint: str, **kwargs: Any) -> Settings:
        given = {"endpoint": endpoint, "timeout_s": 5.0, "interval_s": 0.2, "state_dir": str(state_dir), **kwargs}
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
                "TALLYMARK_TIMEOUT": "10",
                "TALLYMARK_STATE_DIR": str(state_dir),
                **env,
            },
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return run
