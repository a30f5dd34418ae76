"""Websockets through a real server: whose usage is what is recorded in them, and by which route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, WebSocket
from litestar import Litestar, websocket
from litestar.connection import WebSocket as LitestarWebSocket
from starlette.applications import Starlette
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tallymark import identify, measure, record, track_usage
from tallymark.assembly import Runtime
from tallymark.calls import current_call
from tallymark.identity import current_identity
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.settings import Settings
from tallymark.testing import Captured
from tests.sdk.integrations.clients import PATIENCE_S, ask, by_header, eventually, rows, uvicorn_serving


@contextmanager
def open_websocket(port: int, path: str, **headers: str) -> Iterator[ClientConnection]:
    uri = f"ws://127.0.0.1:{port}{path}"
    with connect(uri, additional_headers=headers, open_timeout=PATIENCE_S, close_timeout=PATIENCE_S, proxy=None) as one:
        yield one


def say(port: int, path: str, *words: str, **headers: str) -> list[str]:
    """What is answered to some words, the last of which is "end"."""
    with open_websocket(port, path, **headers) as one:
        answers = []
        for word in (*words, "end"):
            one.send(word)
            answers.append(str(one.recv(PATIENCE_S)))
        with pytest.raises(ConnectionClosed):
            one.recv(PATIENCE_S)
        return answers


def reads_header(account: Annotated[str | None, Header()] = None) -> None:
    if account is not None:
        identify(plan="pro")


@track_usage("talks")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    word = ""
    while word != "end":
        word = await websocket.receive_text()
        record("words")
        if word == "raise":
            raise ZeroDivisionError
        if word.startswith("i am "):
            identify(account=word.removeprefix("i am "))
        await websocket.send_text(f"{word} {current_identity().account}")
    await websocket.close()


async def home(request: Any) -> Any:
    raise AssertionError


def starlette() -> Any:
    below = Starlette(routes=[WebSocketRoute("/talk/{n}", talk)])
    return Starlette(routes=[Route("/", home), Mount("/v1/{tenant}", below), WebSocketRoute("/top", talk)])


def fastapi() -> Any:
    app, router = FastAPI(), APIRouter(prefix="/talk")

    @router.websocket("/{n}")
    async def numbered(websocket: WebSocket, n: int, _: Annotated[None, Depends(reads_header)]) -> None:
        await talk(websocket)

    app.include_router(router, prefix="/v1/{tenant}")
    app.websocket("/top")(talk)
    return app


ROUTE = "/v1/{tenant}/talk/{n}"


def metered(app: Any) -> UsageMiddleware:
    return UsageMiddleware(app, identify=by_header, track=[track_usage("requests")])


@pytest.mark.parametrize("make", [starlette, fastapi])
def test_what_is_recorded_in_a_websocket_has_its_account_and_its_route(usage: Captured, make: Any) -> None:
    with uvicorn_serving(metered(make()), ws="auto") as port:
        assert say(port, "/v1/t/talk/1", "one", "two", account="acme") == ["one acme", "two acme", "end acme"]
        assert say(port, "/top", "i am late", account="globex") == ["i am late late", "end late"]
        assert say(port, "/v1/t/talk/2") == ["end None"]
        assert ask(port, "/nowhere", account="acme") == 404
        eventually(lambda: usage.total("talks") == 3)
    # No method, no status: these are of requests.
    assert rows(usage, "words") == {
        ("acme", None, ROUTE, None, None): 3,
        ("globex", None, "/top", None, None): 1,
        ("late", None, "/top", None, None): 1,
        (None, None, ROUTE, None, None): 1,
    }
    assert rows(usage, "talks") == {
        ("acme", None, ROUTE, None, None): 1,
        ("late", None, "/top", None, None): 1,
        (None, None, ROUTE, None, None): 1,
    }
    assert rows(usage, "requests") == {("acme", "GET", None, 404, None): 1}
    assert usage.total("words", plan="pro") == (3 if make is fastapi else 0)


def test_litestar(usage: Captured) -> None:
    @websocket("/talk/{n:int}")
    async def handler(socket: LitestarWebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        record("words")
        await socket.send_text("hello")
        await socket.close()

    with (
        uvicorn_serving(metered(Litestar([handler])), ws="auto") as port,
        open_websocket(port, "/talk/3", account="acme") as one,
    ):
        assert one.recv(PATIENCE_S) == "hello"
    assert rows(usage) == {("acme", None, "/talk/{n}", None, None): 1}


def test_one_that_fails_and_one_whose_client_goes_away(usage: Captured) -> None:
    with uvicorn_serving(metered(starlette()), ws="auto") as port:
        with open_websocket(port, "/top", account="acme") as one:
            one.send("raise")
            with pytest.raises(ConnectionClosed):
                one.recv(PATIENCE_S)
        with open_websocket(port, "/top", account="globex") as one:
            one.send("word")
            assert one.recv(PATIENCE_S) == "word globex"
        eventually(lambda: usage.total("talks") == 2)
    assert rows(usage, "talks") == {
        ("acme", None, "/top", None, "ZeroDivisionError"): 1,
        ("globex", None, "/top", None, "WebSocketDisconnect"): 1,
    }
    assert usage.total("words") == 2


def test_two_middlewares_are_one_websocket(usage: Captured) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        before.append((current_call.get(), current_identity().account))
        await send({"type": "websocket.accept"})
        record("words")
        await send({"type": "websocket.close"})

    before: list[Any] = []
    inner = UsageMiddleware(app, identify=lambda scope: {"plan": "pro"}, track=[track_usage("requests")])
    with uvicorn_serving(metered(inner), ws="auto") as port:
        for _ in range(2):
            with open_websocket(port, "/", account="acme") as one, pytest.raises(ConnectionClosed):
                one.recv(PATIENCE_S)
    assert {account for _, account in before} == {"acme"}
    assert len({call for call, _ in before}) == 2
    assert [(u.meter, u.account, u.plan, u.quantity) for u in usage] == [("words", "acme", "pro", 2)]
    assert all(call.has_ended for call, _ in before)


def test_the_callers_baggage_names_whom_a_websocket_is_for(usage: Captured, fresh: Runtime) -> None:
    fresh_settings = Settings(accepts_baggage=True)
    with uvicorn_serving(UsageMiddleware(starlette()), ws="auto") as port:
        assert say(port, "/top", baggage="tallymark.account.id=acme") == ["end None"]
        usage._runtime.settings = fresh_settings
        assert say(port, "/top", baggage="tallymark.account.id=acme") == ["end acme"]


def test_bodies_bytes_are_not_measured_where_there_is_no_body(
    usage: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    @track_usage("egress", measure.response_bytes)
    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", handler)])
    with (
        uvicorn_serving(metered(app), ws="auto") as port,
        open_websocket(port, "/") as one,
        pytest.raises(ConnectionClosed),
    ):
        one.recv(PATIENCE_S)
    assert list(usage) == []
    assert "bytes of a body" in caplog.text
