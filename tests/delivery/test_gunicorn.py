"""gunicorn's workers: answered is billed, whether one is killed, all are replaced, or the server is ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.delivery.test_sdk_killed import LAST
from tests.sdk.fake_collector import FakeCollector

WORKERS = 2
ACCOUNTS = 5
PATIENCE = 60.0

CLASSES = {
    "sync": ("wsgi", ["-k", "sync"]),
    "gthread": ("wsgi", ["-k", "gthread", "--threads", "4"]),
    "uvicorn": ("asgi", ["-k", "uvicorn_worker.UvicornWorker"]),
}


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Service:
    """gunicorn and what it has answered."""

    def __init__(self, port: int, master: psutil.Process) -> None:
        self.port = port
        self.master = master
        self.answered: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()

    def ask(self, number: int) -> bool:
        account = f"account-{number % ACCOUNTS}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", f"/?{account}")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"done\n")
        except (OSError, http.client.HTTPException):
            self.unanswered[account] += 1
            return False
        else:
            self.answered[account] += 1
            return True
        finally:
            connection.close()

    def drive(self, requests: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(self.ask, number) for number in range(requests // 2)]
            meanwhile()
            asked += [pool.submit(self.ask, number) for number in range(requests // 2)]
            for one in asked:
                one.result()

    def workers(self) -> set[int]:
        return {child.pid for child in self.master.children()}


@contextmanager
def running(kind: str, preload: bool, endpoint: str, folder: Path) -> Iterator[Service]:
    application, arguments = CLASSES[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", f"tests.delivery.gunicorn_service:{application}", *arguments),
                *("--workers", str(WORKERS), "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "20"),
                *(["--preload"] if preload else []),
            ],
            cwd=Path(__file__).parents[2],
            env=environment(endpoint, folder),
            stdout=log,
            stderr=log,
        )
    service = Service(port, psutil.Process(server.pid))
    family: list[psutil.Process] = []
    try:
        until(lambda: service.ask(0), "the service did not start")
        service.unanswered.clear()  # nobody was there to count these
        yield service
        family = service.master.children(recursive=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
        with suppress(psutil.NoSuchProcess):
            family += service.master.children(recursive=True)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.kill()
        server.wait(60)


def environment(endpoint: str, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder),
        "OTEL_SERVICE_NAME": "gunicorn",
        "TALLYMARK_ENDPOINT": endpoint,
        "TALLYMARK_STATE_DIR": str(folder / "state"),
        "TALLYMARK_EXPORT_INTERVAL": "0.3",
    }


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
@pytest.mark.parametrize("kind", CLASSES)
def test_answered_is_billed(kind: str, preload: bool, tmp_path: Path) -> None:
    collector = FakeCollector()
    try:
        with running(kind, preload, collector.endpoint, tmp_path) as service:
            service.drive(200)
            before = service.workers()
            os.kill(min(before), signal.SIGKILL)  # between two requests: what it had answered is on the disk
            until(lambda: len(service.workers() - before) == 1, "no new worker")
            service.drive(200)
            assert not service.unanswered
            before = service.workers()
            service.drive(400, lambda: os.kill(service.master.pid, signal.SIGHUP))
            until(lambda: len(service.workers() - before) == WORKERS == len(service.workers()), "no reload")
            service.drive(100)
        last = subprocess.run(
            [sys.executable, "-c", LAST],
            env=environment(collector.endpoint, tmp_path),
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert last.returncode == 0, last.stderr
        billed: Counter[str] = Counter()
        for (_, meter, _, attributes, _, _), value in collector.points().items():
            if meter == "api.requests":
                account = {name: raw[2:].decode() for name, raw in attributes}["tallymark.account.id"]
                billed[account] += int(value)
        assert sum(service.answered.values()) >= 800
        for account, answered in service.answered.items():
            # Only a request that was cut off while all workers were replaced may have been counted or not.
            assert answered <= billed[account] <= answered + service.unanswered[account], (tmp_path / "log").read_text()
        assert [path for path in (tmp_path / "state").rglob("*") if path.is_file()] == []
    finally:
        collector.stop()
