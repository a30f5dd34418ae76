"""An ASGI application that raises at its start: whose failure it is, and who is answered for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from django.core.handlers.asgi import ASGIHandler
from fastapi import FastAPI
from litestar import Litestar
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from tallymark import record
from tallymark.assembly import Runtime
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.integrations.asgi_lifespan import supports_lifespan
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.asgi_server import BOTH, Server


class Misconfigured:
    """A middleware: Starlette makes it at the first message, before anything is received."""

    def __init__(self, app: Any) -> None:
        raise RuntimeError("misconfigured")


class Around:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def broken(app: Any) -> Any:
    app.add_middleware(Misconfigured)
    return app


class OwnStarlette(Starlette):
    pass


class OwnFastApi(FastAPI):
    pass


KNOWN: dict[str, Callable[[], Any]] = {
    "starlette": lambda: broken(Starlette()),
    "fastapi": lambda: broken(FastAPI()),
    "starlette's heir": lambda: broken(OwnStarlette()),
    "fastapi's heir": lambda: broken(OwnFastApi()),
    "inside others": lambda: Around(GZipMiddleware(UsageMiddleware(broken(FastAPI())))),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
async def test_an_application_that_fails_before_it_receives_anything_is_not_answered_for(
    configured: Runtime, make: Callable[[], Any]
) -> None:
    server = Server("lifespan.startup")
    with pytest.raises(RuntimeError, match="misconfigured"):
        await server.run(make())
    assert server.told == []


def test_whom_it_knows() -> None:
    for known in (Litestar([]), Starlette(), FastAPI().router, Around(Litestar([]))):
        assert supports_lifespan(known)
    for other in (None, ASGIHandler, Around, GZipMiddleware(Around(print))):  # type: ignore[arg-type]
        assert not supports_lifespan(other)


def test_a_service_that_cannot_start_does_not_start(configured: Runtime) -> None:
    config = uvicorn.Config(UsageMiddleware(broken(Starlette())), lifespan="on", log_level="critical")
    config.load()
    lifespan = config.lifespan_class(config)
    asyncio.run(lifespan.startup())
    assert lifespan.should_exit


async def test_what_is_hidden_from_the_middleware_outside_is_told_by_the_one_inside(configured: Runtime) -> None:
    inside = UsageMiddleware(broken(Starlette()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inside(scope, receive, send)

    with pytest.raises(RuntimeError, match="misconfigured"):
        await Server("lifespan.startup").run(app)


async def test_an_application_that_may_not_know_the_protocol_is_answered_for_with_a_warning(
    configured: Runtime, collector: FakeCollector, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record("starts")
        assert scope["type"] == "http"

    # A framework's middleware around it says nothing of what it is itself.
    assert await Server("lifespan.startup", "lifespan.shutdown").run(GZipMiddleware(app)) == BOTH
    assert collector.totals() == {"starts": 1}
    (line,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "before it received anything" in line.message
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], AssertionError)


async def test_an_application_that_looks_at_nobodys_attributes_is_asked_in_vain(configured: Runtime) -> None:
    class Odd:
        @property
        def app(self) -> Any:
            raise ZeroDivisionError

        async def __call__(self, *_: Any) -> None:
            raise KeyError

    class Endless(Odd):
        @property
        def app(self) -> Any:
            return Endless()

    for odd in (Odd(), Endless()):
        assert await Server("lifespan.startup", "lifespan.shutdown").run(odd) == BOTH


@pytest.mark.parametrize("around", [lambda app: app, Around, GZipMiddleware, CORSMiddleware])
async def test_django_is_answered_for_in_silence(
    configured: Runtime, collector: FakeCollector, caplog: pytest.LogCaptureFixture, around: Any
) -> None:
    record("starts")
    assert (
        await Server("lifespan.startup", "lifespan.shutdown").run(around(ASGIHandler.__call__.__get__(Site()))) == BOTH
    )
    assert collector.totals() == {"starts": 1}
    assert [one for one in caplog.records if one.levelname != "INFO"] == []


class Site:
    """As much of a handler of Django's as answers a lifespan."""
