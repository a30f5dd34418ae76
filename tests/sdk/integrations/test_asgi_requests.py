"""Every request of an ASGI service, counted by what the client saw: status, template, bytes, account."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from http.client import IncompleteRead
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tallymark import identify, measure, record, track_usage
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.testing import Captured
from tests.sdk.integrations.clients import ask, by_header, call, eventually, leave_midway, rows, uvicorn_serving


def metered(app: Any, **kwargs: Any) -> UsageMiddleware:
    """Around the whole application, so that nothing is answered outside of it."""
    track = [
        track_usage("requests"),
        track_usage("egress", measure.response_bytes),
        track_usage("ingress", measure.request_bytes),
    ]
    return UsageMiddleware(app, identify=by_header, track=track, **kwargs)


class Item(BaseModel):
    price: int


class UpstreamAnswer(BaseModel):
    status_code: int


def upstream_answer() -> UpstreamAnswer:
    return UpstreamAnswer(status_code=503)


class NoMoneyError(Exception):
    status_code = 999  # not an HTTP status of ours: what a client library's error may carry


def shop() -> FastAPI:
    app = FastAPI()
    router = APIRouter(prefix="/v1")
    below = FastAPI()

    @router.get("/items/{item}")
    async def read(item: int) -> dict[str, int]:
        return {"item": item}

    @router.post("/items", status_code=201)
    def create(item: Item) -> Item:
        return item

    @router.get("/broken", response_model=Item)
    def broken() -> dict[str, str]:
        return {"price": "none"}

    @router.get("/poor")
    def poor() -> None:
        raise NoMoneyError

    @router.get("/refused")
    def refused() -> None:
        raise HTTPException(403)

    @router.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError

    @app.exception_handler(NoMoneyError)
    async def without_money(request: Request, error: NoMoneyError) -> JSONResponse:
        return JSONResponse({"detail": "pay first"}, status_code=402)

    @below.get("/deep/{z}")
    async def deep(z: str) -> str:
        return z

    app.include_router(router, prefix="/api")
    app.mount("/sub/{tenant}", below)
    app.mount("/files", StaticFiles(directory="docs"))
    return app


def test_each_request_is_counted_as_it_was_answered(usage: Captured) -> None:
    asked = [
        ("GET", "/api/v1/items/1", "/api/v1/items/{item}", None),
        ("GET", "/api/v1/items/x", "/api/v1/items/{item}", None),  # 422
        ("HEAD", "/api/v1/items/1", "/api/v1/items/{item}", None),  # 405 in FastAPI
        ("DELETE", "/api/v1/items/1", "/api/v1/items/{item}", None),  # 405
        ("POST", "/api/v1/items", "/api/v1/items", b'{"price": 3}'),
        ("POST", "/api/v1/items", "/api/v1/items", b'{"price": "x"}'),
        ("POST", "/api/v1/items", "/api/v1/items", b"no json " * 20_000),
        ("GET", "/api/v1/poor", "/api/v1/poor", None),
        ("GET", "/api/v1/refused", "/api/v1/refused", None),
        ("GET", "/nowhere/17", None, None),
        ("GET", "/api/v1/items/", None, None),  # 404, or a redirect
        ("GET", "/sub/acme/deep/1", "/sub/{tenant}/deep/{z}", None),
        ("POST", "/sub/acme/deep/1", "/sub/{tenant}/deep/{z}", None),
        ("GET", "/sub/acme/nowhere", None, None),
        ("GET", "/files/sql.md", "/files/{path}", None),
        ("HEAD", "/files/sql.md", "/files/{path}", None),
        ("GET", "/files/none.md", "/files/{path}", None),
        ("GET", "/docs", "/docs", None),
        ("GET", "/api/v1/crash", "/api/v1/crash", None),
        ("GET", "/api/v1/broken", "/api/v1/broken", None),
    ]
    seen: Counter[tuple[Any, ...]] = Counter()
    received = sent = 0
    with uvicorn_serving(metered(shop())) as port:
        for method, path, route, body in asked:
            answer = call(port, path, method, body, account="acme")
            received += answer.size
            sent += answer.sent
            seen[("acme", method, route, answer.status)] += 1
    assert received > 4_000
    assert usage.total("egress", account="acme") == usage.total("egress") == received
    assert usage.total("ingress", account="acme") == usage.total("ingress") == sent
    counted = rows(usage, "requests")
    assert Counter({key[:4]: quantity for key, quantity in counted.items()}) == seen
    failures = {key[2]: key[4] for key in counted if key[4] is not None}
    assert failures == {"/api/v1/crash": "ZeroDivisionError", "/api/v1/broken": "ResponseValidationError"}


def test_answers_from_before_the_routing(usage: Captured) -> None:
    async def gatekeeper(request: Request, go_on: Any) -> Any:
        if "key" not in request.headers:
            return PlainTextResponse("who?", 401)
        return await go_on(request)

    app = shop()
    app.add_middleware(BaseHTTPMiddleware, dispatch=gatekeeper)
    with uvicorn_serving(metered(app)) as port:
        assert ask(port, "/api/v1/items/1", account="acme") == 401
        assert ask(port, "/api/v1/items/1", account="acme", key="k") == 200
    assert rows(usage, "requests") == {
        ("acme", "GET", None, 401, None): 1,
        ("acme", "GET", "/api/v1/items/{item}", 200, None): 1,
    }


def test_a_handlers_own_count_has_the_status_that_went_out(usage: Captured) -> None:
    app = FastAPI()

    @app.get("/injected")
    @track_usage("calls")
    def injected(response: Response) -> str:
        response.status_code = 207
        return "x"

    @app.get("/model")
    @track_usage("calls")
    def model() -> UpstreamAnswer:
        return UpstreamAnswer(status_code=502)

    @app.get("/upstream")
    @track_usage("calls")
    def upstream() -> None:
        raise NoMoneyError

    @app.get("/mapped")
    @track_usage("calls")
    def mapped() -> None:
        raise HTTPException(404)

    @app.get("/dependency")
    @track_usage("calls")
    def own(found: Annotated[UpstreamAnswer, Depends(upstream_answer)]) -> JSONResponse:
        return JSONResponse(found.status_code, status_code=203)

    @app.exception_handler(HTTPException)
    async def hidden(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({}, status_code=410)

    with uvicorn_serving(metered(app)) as port:
        seen = {path: ask(port, path) for path in ("/injected", "/model", "/upstream", "/mapped", "/dependency")}
    assert seen == {"/injected": 207, "/model": 200, "/upstream": 500, "/mapped": 410, "/dependency": 203}
    assert {key[2]: key[3] for key in rows(usage, "calls")} == seen
    assert {key[2]: key[4] for key in rows(usage, "calls") if key[4]} == {"/upstream": "NoMoneyError"}


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_stream_counts_when_it_ends(usage: Captured, kind: str) -> None:
    chunk = b"x" * 1000

    @track_usage("chunks", measure.items)
    async def asynchronous() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield chunk

    @track_usage("chunks", measure.items)
    def synchronous() -> Iterator[bytes]:
        for _ in range(50):
            yield chunk

    async def handler(request: Request) -> StreamingResponse:
        identify(account="streamer")
        return StreamingResponse(asynchronous() if kind == "async" else synchronous(), status_code=206)

    with uvicorn_serving(metered(Starlette(routes=[Route("/s/{n}", handler)]))) as port:
        answer = call(port, "/s/1")
        assert ask(port, "/s/1", "HEAD") == 206
    assert (answer.status, answer.size) == (206, 50_000)
    assert usage.total("egress", account="streamer") == usage.total("egress") == 50_000
    assert rows(usage, "chunks")["streamer", "GET", "/s/{n}", 206, None] == 50
    assert rows(usage, "requests") == {
        ("streamer", "GET", "/s/{n}", 206, None): 1,
        ("streamer", "HEAD", "/s/{n}", 206, None): 1,
    }


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_client_that_goes_away_is_counted_once(usage: Captured, kind: str) -> None:
    @track_usage("streams")
    async def asynchronous() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 10_000
            await asyncio.sleep(0.001)

    @track_usage("streams")
    def synchronous() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000
            time.sleep(0.001)

    async def handler(request: Request) -> StreamingResponse:
        return StreamingResponse(asynchronous() if kind == "async" else synchronous())

    with uvicorn_serving(metered(Starlette(routes=[Route("/s", handler)]))) as port:
        read = [leave_midway(port, "/s", 50_000, account=account) for account in ("acme", "globex", "acme")]
        eventually(lambda: usage.total("requests") == 3)
        # Starlette closes nobody's generator: a synchronous one ends when Python finds it, in a cycle.
        eventually(lambda: gc.collect() >= 0 and usage.total("streams") == 3)
        assert ask(port, "/nowhere") == 404
    for account, times in (("acme", 2), ("globex", 1)):
        assert rows(usage, "requests")[account, "GET", "/s", 200, "IncompleteAnswerError"] == times
        assert usage.total("streams", account=account) == times
    assert {key[4] for key in rows(usage, "streams")} <= {"GeneratorExit", "CancelledError"}
    assert usage.total("egress") > sum(read) * 0.9


def test_a_request_ends_with_its_answer_not_with_its_background_task(usage: Captured) -> None:
    go_on = threading.Event()

    @track_usage("jobs")
    def job() -> None:
        go_on.wait(30)

    async def handler(request: Request) -> PlainTextResponse:
        identify(account="acme")
        return PlainTextResponse("x", background=BackgroundTask(job))

    with uvicorn_serving(metered(Starlette(routes=[Route("/", handler)]))) as port:
        assert call(port, "/").body == b"x"
        eventually(lambda: usage.total("requests", account="acme") == 1)
        assert usage.total("jobs") == 0
        go_on.set()
    assert rows(usage, "jobs") == {("acme", "GET", "/", 200, None): 1}
    assert usage.total("requests") == usage.total("egress") == 1


@pytest.mark.parametrize("resolved", [None, "key-owner"])
def test_an_identity_set_behind_a_base_http_middleware_is_the_requests(usage: Captured, resolved: str | None) -> None:
    async def between(request: Request, go_on: Any) -> Any:
        return await go_on(request)

    @track_usage("calls")
    async def handler(request: Request) -> PlainTextResponse:
        identify(account="customer")
        with identify(account="other"):
            record("inner")
        return PlainTextResponse("x")

    app = Starlette(routes=[Route("/", handler)], middleware=[Middleware(BaseHTTPMiddleware, dispatch=between)])
    with uvicorn_serving(metered(app)) as port:
        assert ask(port, "/", **({} if resolved is None else {"account": resolved})) == 200
    assert usage.total("requests", account="customer") == usage.total("requests") == 1
    assert usage.total("calls", account="customer") == usage.total("inner", account="other") == 1


def test_a_task_that_acts_for_somebody_else_does_not_take_the_request(usage: Captured) -> None:
    async def elsewhere() -> None:
        identify(account="other")

    async def handler(request: Request) -> PlainTextResponse:
        identify(account="customer")
        await asyncio.create_task(elsewhere())
        return PlainTextResponse("x")

    with uvicorn_serving(metered(Starlette(routes=[Route("/", handler)]))) as port:
        assert ask(port, "/", account="key-owner") == 200
    assert usage.total("requests", account="customer") == usage.total("requests") == 1


def test_two_middlewares_are_one_request(usage: Captured) -> None:
    async def inner(request: Request) -> PlainTextResponse:
        await request.body()
        return PlainTextResponse("four")

    def only_for_plans(scope: Any) -> dict[str, str]:
        return {"plan": "pro"}

    requests, egress = track_usage("requests"), track_usage("egress", measure.response_bytes)
    below = Starlette(
        routes=[Route("/{x}", inner, methods=["POST"])],
        middleware=[Middleware(UsageMiddleware, identify=only_for_plans, track=[requests, track_usage("below")])],
    )
    app = Starlette(routes=[Mount("/m", below)])
    twice = UsageMiddleware(UsageMiddleware(app, track=[requests, egress]), identify=by_header, track=[requests])
    with uvicorn_serving(twice) as port:
        assert call(port, "/m/1", "POST", b"body", account="acme").body == b"four"
    assert rows(usage, "requests") == {("acme", "POST", "/m/{x}", 200, None): 1}
    assert usage.total("egress", account="acme", plan="pro") == 4
    assert usage.total("below", account="acme", plan="pro") == 1


def test_methods_of_classes_and_one_endpoint_at_two_paths(usage: Captured) -> None:
    class Thing(HTTPEndpoint):
        @track_usage("calls")
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("x")

        @track_usage("calls")
        def post(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("x", 201)

    app = FastAPI()
    app.add_route("/a/{x}", Thing)
    app.add_route("/b/{y}", Thing)
    app.mount("/m", Starlette(routes=[Route("/c/{z}", Thing)]))
    with uvicorn_serving(metered(app)) as port:
        assert [ask(port, path) for path in ("/a/1", "/b/1", "/m/c/1")] == [200] * 3
        assert [ask(port, "/b/1", method) for method in ("POST", "PUT")] == [201, 405]
    assert {key[1:4]: n for key, n in rows(usage, "calls").items()} == {
        ("GET", "/a/{x}", 200): 1,
        ("GET", "/b/{y}", 200): 1,
        ("GET", "/m/c/{z}", 200): 1,
        ("POST", "/b/{y}", 201): 1,
    }
    assert rows(usage, "requests")[None, "PUT", "/b/{y}", 405, None] == 1


def test_an_application_that_does_not_answer(usage: Captured) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/half":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})

    with uvicorn_serving(metered(silent)) as port:
        assert ask(port, "/") == 500
        with pytest.raises((IncompleteRead, ConnectionError)):
            ask(port, "/half")
    assert rows(usage, "requests") == {
        (None, "GET", None, 500, "500"): 1,
        (None, "GET", None, 200, "IncompleteAnswerError"): 1,
    }


async def test_a_file_that_the_server_sends_by_itself(usage: Captured, tmp_path: Any) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1234)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(file)})

    async def ignore(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "headers": []}
    await metered(app)(scope, None, ignore)  # type: ignore[arg-type]
    assert rows(usage, "requests") == {(None, "GET", None, 200, None): 1}
    assert usage.total("egress") == 1234


@pytest.mark.parametrize("there", [True, False])
async def test_a_file_that_is_gone_once_it_has_been_sent(
    usage: Captured, tmp_path: Any, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    file = tmp_path / "file"
    if there:
        file.write_bytes(b"x" * 1234)
    goes_on = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(file)})
        goes_on.append(True)

    async def take_over(message: Any) -> None:
        if message["type"] == "http.response.pathsend":
            file.unlink(missing_ok=True)

    await metered(app)({"type": "http", "method": "GET", "headers": []}, None, take_over)  # type: ignore[arg-type]
    assert goes_on == [True]
    assert rows(usage, "requests") == {(None, "GET", None, 200, None): 1}
    assert usage.total("egress") == (1234 if there else 0)
    assert ("its bytes are not counted" in caplog.text) is not there
