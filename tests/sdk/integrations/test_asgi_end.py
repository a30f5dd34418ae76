"""The end of an ASGI service: what it has counted is delivered before a signal ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

import tallymark
from tallymark import record
from tallymark.assembly import Runtime
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.settings import Settings
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.asgi_server import BOTH, Server
from tests.sdk.integrations.clients import PATIENCE_S, ask, eventually, uvicorn_serving

UVICORN = ("-m", "uvicorn", "--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning")
GUNICORN = ("-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "--worker-class")

HEAD = """
import tallymark
from tallymark import track_usage
from tallymark.integrations.asgi import UsageMiddleware

tallymark.configure()
TRACK = [track_usage("requests")]

async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})
"""

SERVICES = {
    "starlette": """
        from contextlib import asynccontextmanager
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse
        from starlette.routing import Route

        @asynccontextmanager
        async def lifespan(app):
            yield
            tallymark.record("ends")

        async def home(request):
            return PlainTextResponse("x")

        app = Starlette(routes=[Route("/", home)], lifespan=lifespan)
        app.add_middleware(UsageMiddleware, track=TRACK)
        app = UsageMiddleware(app)
        """,
    "fails": """
        async def fails(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                await send({"type": "lifespan.startup.complete"})
                await receive()
                tallymark.record("ends")
                raise ZeroDivisionError
            await answer(scope, receive, send)

        app = UsageMiddleware(fails, track=TRACK)
        """,
    "raises": """
        async def raises(scope, receive, send):
            if scope["type"] != "http":
                raise ValueError(scope["type"])
            await answer(scope, receive, send)

        app = UsageMiddleware(raises, track=TRACK)
        """,
    "returns": """
        async def returns(scope, receive, send):
            if scope["type"] == "http":
                await answer(scope, receive, send)

        app = UsageMiddleware(returns, track=TRACK)
        """,
    "django": """
        import django
        from django.conf import settings
        from django.core.handlers.asgi import ASGIHandler
        from django.http import HttpResponse
        from django.urls import path

        urlpatterns = [path("", lambda request: HttpResponse("x"))]
        settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MIDDLEWARE=[])
        django.setup(set_prefix=False)
        app = UsageMiddleware(ASGIHandler(), track=TRACK)
        """,
}


class Service:
    """A server in a process of its own, which sends nothing by itself before it ends."""

    def __init__(self, folder: Path, collector: str, command: tuple[str, ...], **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "log"
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path("sdk").resolve()), str(folder)]),
            "TALLYMARK_ENDPOINT": collector,
            "TALLYMARK_STATE_DIR": str(folder / "state"),
            "TALLYMARK_EXPORT_INTERVAL": "86400",
            "TALLYMARK_SHUTDOWN_TIMEOUT": "60",
            **env,
        }
        arguments = [argument.format(port=self.port) for argument in command]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=environ, cwd=folder, stdout=out, stderr=out
            )

    def answers(self) -> int:
        """1 where it answers now, else 0."""
        assert self.process.poll() is None, self.log.read_text()
        with suppress(OSError):
            return int(ask(self.port, "/") == 200)
        return 0

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running(folder: Path, source: str, *args: Any, **env: str) -> Iterator[Service]:
    """Up, and asked once, when the block begins."""
    (folder / "shop.py").write_text(HEAD + textwrap.dedent(source))
    service = Service(folder, *args, **env)
    try:
        eventually(lambda: service.answers() == 1)
        yield service
    finally:
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_uvicorn_ends_has_delivered_everything(
    collector: FakeCollector, tmp_path: Path, name: str
) -> None:
    with running(tmp_path, SERVICES[name], collector.endpoint, (*UVICORN, "shop:app")) as service:
        assert sum(service.answers() for _ in range(9)) == 9
        assert collector.requests == []
        assert service.end() == -signal.SIGTERM
    totals = collector.totals()
    assert totals.pop("ends", 0) == (1 if name in ("starlette", "fails") else 0)
    assert totals == {"requests": 10}
    assert len(collector.closed()) == 1
    assert "tallymark" not in service.log.read_text()


@pytest.mark.parametrize("worker", ["uvicorn_worker.UvicornWorker"])
def test_workers_of_gunicorn(collector: FakeCollector, tmp_path: Path, worker: str) -> None:
    command = (*GUNICORN, worker, "--worker-tmp-dir", ".", "--graceful-timeout", "60", "shop:app")
    with running(tmp_path, SERVICES["starlette"], collector.endpoint, command) as service:
        assert sum(service.answers() for _ in range(19)) == 19
        assert service.end() == 0
    assert collector.totals()["requests"] == 20


def test_a_reload_delivers_what_the_old_code_has_counted(collector: FakeCollector, tmp_path: Path) -> None:
    command = (*UVICORN, "--reload", "--reload-delay", "0.05", "shop:app")
    with running(tmp_path, SERVICES["starlette"], collector.endpoint, command) as service:
        eventually(lambda: service.answers() == 1)
        source = tmp_path / "shop.py"
        changed = source.read_text().replace('"requests"', '"requests.of.new.code"')

        def has_reloaded() -> bool:
            source.write_text(changed)  # the first may come before it looks
            os.utime(source)
            return "requests" in collector.totals()

        eventually(has_reloaded)
        assert collector.totals()["requests"] == 2
        eventually(lambda: service.answers() == 1)
        service.end()
    assert collector.totals()["requests.of.new.code"] >= 1


def test_a_service_without_a_collector_ends_all_the_same_and_says_what_it_leaves(
    collector: FakeCollector, tmp_path: Path, unused_port: int
) -> None:
    command = (*UVICORN, "shop:app")
    with running(
        tmp_path, SERVICES["raises"], f"http://127.0.0.1:{unused_port}", command, TALLYMARK_SHUTDOWN_TIMEOUT="0.5"
    ) as service:
        assert service.end() == -signal.SIGTERM
    log = service.log.read_text()
    assert "the service ends with usage that no collector has acknowledged: requests=1; the next process" in log


def test_an_application_may_be_started_again_in_the_same_process(configured: Runtime, collector: FakeCollector) -> None:
    app = Starlette()
    app.add_middleware(UsageMiddleware)
    for n in range(1, 4):
        with uvicorn_serving(UsageMiddleware(app), lifespan="on"):
            record("starts")
        assert collector.totals() == {"starts": n}
    record("starts", 10)
    assert configured.settings is not None
    assert tallymark.flush(PATIENCE_S)
    assert collector.totals() == {"starts": 13}
    assert {time for *_, time in collector.control()} >= {*collector.closed().values()}


def test_two_applications_that_end_at_once_wait_for_one_delivery(configured: Runtime, collector: FakeCollector) -> None:
    together = threading.Barrier(2)

    def run() -> None:
        with uvicorn_serving(UsageMiddleware(Starlette()), lifespan="on"):
            record("starts")
            together.wait(PATIENCE_S)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collector.totals() == {"starts": 2}


@pytest.mark.parametrize("says", [0, 1, 2])
async def test_what_an_application_leaves_unsaid_is_said(
    configured: Runtime, collector: FakeCollector, says: int
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record("starts")
        for message in BOTH[:says]:
            await receive()
            await send({"type": message})

    assert await Server("lifespan.startup", "lifespan.shutdown").run(app) == BOTH
    assert collector.totals() == {"starts": 1}


async def test_a_startup_that_fails_is_the_servers_to_know(configured: Runtime) -> None:
    async def told(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed"})

    async def raised(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ZeroDivisionError

    assert await Server("lifespan.startup").run(told) == ["lifespan.startup.failed"]
    with pytest.raises(ZeroDivisionError):
        await Server("lifespan.startup").run(raised)


async def test_nothing_of_ours_is_raised_into_it(
    configured: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    def broken() -> bool:
        raise RuntimeError("broken")

    monkeypatch.setattr(configured, "finish", broken)
    assert await Server("lifespan.startup", "lifespan.shutdown").run(app) == BOTH
    assert "usage could not be delivered at the end: RuntimeError('broken')" in caplog.text
    # A server that ends in the middle of it, and one that does not know what it is saying.
    assert await Server("lifespan.startup").run(app) == BOTH[:1]
    assert await Server("something.else").run(app) == []


async def test_threads_that_are_all_taken_hold_up_no_end(
    fresh: Runtime, collector: FakeCollector, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record("starts")

    fresh.configure(settings(collector.endpoint, interval_s=86_400.0, shutdown_timeout_s=0.1))
    goes_on = threading.Event()
    taken = [asyncio.to_thread(goes_on.wait, PATIENCE_S) for _ in range(100)]
    waiting = asyncio.gather(*taken)
    await asyncio.sleep(0)
    assert await Server("lifespan.startup", "lifespan.shutdown").run(app) == BOTH
    assert "usage could not be delivered at the end: TimeoutError" in caplog.text
    goes_on.set()
    await waiting
    assert tallymark.flush(PATIENCE_S)
    assert collector.totals() == {"starts": 1}


async def test_a_cancelled_lifespan_is_not_held(configured: Runtime) -> None:
    started = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await asyncio.sleep(PATIENCE_S)

    task = asyncio.create_task(Server("lifespan.startup").run(app))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
