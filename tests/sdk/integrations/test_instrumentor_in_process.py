"""What the instrumentor replaces, and how it is taken back, in this process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import django.core.handlers.base
import flask
import grpc
import httpx
import pytest
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from werkzeug.test import Client

import tallymark
from tallymark.assembly import Runtime
from tallymark.errors import SettingsError
from tallymark.integrations.instrumentor import TallymarkInstrumentor
from tests.sdk.fake_collector import FakeCollector

PATCHED = [
    (Starlette, "__call__"),
    (flask.Flask, "__call__"),
    (django.core.handlers.base.BaseHandler, "load_middleware"),
    (grpc, "server"),
    (grpc.aio, "server"),
]


@pytest.fixture
def instrumentor(fresh: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[TallymarkInstrumentor]:
    monkeypatch.setenv("TALLYMARK_TRACK", "requests")
    monkeypatch.setenv("TALLYMARK_ENDPOINT", "http://127.0.0.1:1")
    found = TallymarkInstrumentor()
    assert isinstance(found, BaseInstrumentor)
    yield found
    if found.is_instrumented_by_opentelemetry:
        found.uninstrument()


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def test_uninstrument_puts_everything_back(instrumentor: Any) -> None:
    before = [getattr(owner, name) for owner, name in PATCHED]
    for _ in range(2):
        instrumentor.instrument()
        assert all(getattr(owner, name) is not was for (owner, name), was in zip(PATCHED, before, strict=True))
        instrumentor.uninstrument()
        assert [getattr(owner, name) for owner, name in PATCHED] == before


def test_what_was_wrapped_by_others_meanwhile_counts_nothing_afterwards(
    instrumentor: Any, fresh: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = flask.Flask("shop")
    instrumentor.instrument()
    ours = flask.Flask.__call__

    def theirs(self: Any, *args: Any) -> Any:
        return ours(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(flask.Flask, "__call__", theirs)
        Client(app).get("/", buffered=True)
        assert sum(fresh.recorder.sums().values()) == 1
        instrumentor.uninstrument()
        assert flask.Flask.__call__ is theirs
        assert Client(app).get("/", buffered=True).status_code == 404
        assert sum(fresh.recorder.sums().values()) == 1
    flask.Flask.__call__ = ours.__wrapped__  # type: ignore[attr-defined,method-assign]


async def test_an_application_made_before_is_metered_and_not_kept_alive(instrumentor: Any, fresh: Runtime) -> None:
    app = Starlette(routes=[Route("/hello", hello)])
    instrumentor.instrument()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert (await client.get("/hello")).text == "hello"
    assert {stream.meter: value for stream, value in fresh.recorder.sums().items()} == {"requests": 1}
    gone = weakref.ref(app)
    del app, client
    gc.collect()
    assert gone() is None


async def test_an_application_that_cannot_start_is_not_answered_for(instrumentor: Any) -> None:
    class Misconfigured:
        def __init__(self, app: Any) -> None:
            raise RuntimeError("misconfigured")

    async def receive() -> Any:
        raise AssertionError

    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    app = Starlette(routes=[Route("/hello", hello)])
    app.add_middleware(Misconfigured)
    instrumentor.instrument()
    with pytest.raises(RuntimeError, match="misconfigured"):
        await app({"type": "lifespan"}, receive, send)
    assert told == []


def test_a_meter_that_the_service_declares_with_another_unit_is_the_services(
    instrumentor: Any, fresh: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    instrumentor.instrument()

    @tallymark.track_usage("requests", lambda result: 2, unit="{page}")
    def pages() -> None: ...

    pages()
    assert Client(flask.Flask("shop")).get("/", buffered=True).status_code == 404
    assert {(stream.meter, stream.unit): value for stream, value in fresh.recorder.sums().items()} == {
        ("requests", "{page}"): 2
    }
    assert "TALLYMARK_TRACK: requests are not counted by this meter" in caplog.text


def test_the_services_own_configure_replaces_the_environments_once(
    instrumentor: Any, fresh: Runtime, collector: FakeCollector
) -> None:
    instrumentor.instrument()
    assert fresh.settings is not None
    assert fresh.settings.endpoint == "http://127.0.0.1:1"
    tallymark.configure(endpoint=collector.endpoint, interval=0.2)
    tallymark.record("things", 3)
    assert tallymark.flush(60)
    assert collector.totals() == {"things": 3}
    with pytest.raises(SettingsError, match="already configured"):
        tallymark.configure(endpoint=collector.endpoint, interval=0.5)


def test_what_the_service_configured_before_stays(instrumentor: Any, fresh: Runtime, collector: FakeCollector) -> None:
    tallymark.configure(endpoint=collector.endpoint, interval=0.2)
    settings = fresh.settings
    instrumentor.instrument()
    assert fresh.settings == settings
    with pytest.raises(SettingsError, match="already configured"):
        tallymark.configure(endpoint=collector.endpoint, interval=0.5)


def test_a_framework_that_it_does_not_know_is_left_alone(
    instrumentor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(flask.app, "Flask")
    instrumentor.instrument()
    assert "tallymark cannot meter flask.app" in caplog.text
    assert hasattr(Starlette.__call__, "__wrapped__")


def test_nothing_but_the_instrumentor_imports_opentelemetrys_package(run_script: Any) -> None:
    done = run_script(
        """
        import sys
        import tallymark, tallymark.testing
        import tallymark.integrations.asgi, tallymark.integrations.wsgi, tallymark.integrations.grpc
        import tallymark.integrations.from_environment
        tallymark.configure()
        wrong = [name for name in sys.modules if name.startswith(("opentelemetry.instrumentation", "wrapt"))]
        assert not wrong, wrong
        """
    )
    assert done.returncode == 0, done.stderr


def test_no_framework_is_imported_for_it(run_script: Any) -> None:
    done = run_script(
        """
        import sys
        from tallymark.integrations.instrumentor import TallymarkInstrumentor
        TallymarkInstrumentor().instrument()
        wrong = {"starlette", "fastapi", "flask", "django"} & set(sys.modules)
        assert not wrong, wrong
        """
    )
    assert done.returncode == 0, done.stderr
