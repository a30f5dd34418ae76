"""Real requests through a real server: who is billed for what, by which route and status."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route

from tallymark import identify, record, track_usage
from tallymark.assembly import Runtime
from tallymark.identity import current_identity
from tallymark.integrations.asgi import CALL, UsageMiddleware
from tallymark.testing import Captured
from tests.sdk.integrations.clients import ask, by_header, rows


def test_method_route_and_status(usage: Captured, serve: Callable[..., int]) -> None:
    app = FastAPI()

    @app.get("/items/{item}")
    @track_usage("calls")
    async def read(item: int) -> dict[str, int]:
        if item == 404:
            raise HTTPException(404)
        if item == 503:
            raise HTTPException(503)
        if item == 500:
            raise KeyError(item)
        return {"item": item}

    @app.post("/items", status_code=201)
    @track_usage("calls")
    def create() -> str:
        return "made"

    @app.api_route("/strange", methods=["PROPFIND"])
    @track_usage("calls")
    def find() -> JSONResponse:
        return JSONResponse({}, status_code=418)

    app.add_middleware(UsageMiddleware, identify=by_header)
    port = serve(app)
    assert [ask(port, f"/items/{n}", account="acme") for n in (1, 2, 404, 503, 500)] == [200, 200, 404, 503, 500]
    assert ask(port, "/items", "POST", account="acme") == 201
    assert ask(port, "/strange", "PROPFIND", account="acme") == 418
    assert ask(port, "/items/not-a-number", account="acme") == 422
    assert rows(usage) == {
        ("acme", "GET", "/items/{item}", 200, None): 2,
        ("acme", "GET", "/items/{item}", 404, None): 1,
        ("acme", "GET", "/items/{item}", 503, "HTTPException"): 1,
        ("acme", "GET", "/items/{item}", 500, "KeyError"): 1,
        ("acme", "POST", "/items", 201, None): 1,
        ("acme", "_OTHER", "/strange", 418, None): 1,
    }


@pytest.mark.parametrize("handler", ["sync", "async"])
@pytest.mark.parametrize("dependency", ["sync", "async", "sync_yield", "async_yield", "two"])
def test_identity_set_in_a_dependency_reaches_the_handler(
    usage: Captured, serve: Callable[..., int], dependency: str, handler: str
) -> None:
    app = FastAPI()

    def sync(account: Annotated[str, Header()]) -> None:
        time.sleep(0.001)
        identify(account=account)

    async def asynchronous(account: Annotated[str, Header()]) -> None:
        identify(account=account)

    def sync_yield(account: Annotated[str, Header()]) -> Iterator[None]:
        with identify(account=account):
            yield

    async def async_yield(account: Annotated[str, Header()]) -> Any:
        with identify(account=account):
            yield

    def two(account: Annotated[str, Header()], first: Annotated[None, Depends(sync)]) -> None:
        identify(plan="pro")

    chosen = {
        "sync": sync,
        "async": asynchronous,
        "sync_yield": sync_yield,
        "async_yield": async_yield,
        "two": two,
    }[dependency]

    @track_usage("calls")
    def sync_handler() -> str | None:
        return current_identity().account

    @track_usage("calls")
    async def async_handler() -> str | None:
        return current_identity().account

    app.get("/", dependencies=[Depends(chosen)])(sync_handler if handler == "sync" else async_handler)
    app.add_middleware(UsageMiddleware)
    port = serve(app)
    accounts = [f"account-{n}" for n in range(8)] * 5
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda account: ask(port, "/", account=account), accounts)) == {200}
    assert {u.account: u.quantity for u in usage} == {f"account-{n}": 5 for n in range(8)}
    assert {u.plan for u in usage} == {"pro" if dependency == "two" else None}


def test_templates_of_routers_and_mounts(usage: Captured, serve: Callable[..., int]) -> None:
    @track_usage("calls")
    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("x")

    @track_usage("calls")
    def handler() -> int:
        return 1

    inner = APIRouter()
    inner.get("/deep/{z}")(handler)
    router = APIRouter(prefix="/items")
    router.get("/{id}")(handler)
    router.include_router(inner, prefix="/r")
    router.add_route("/plain/{p}", plain)
    below = FastAPI()
    below.get("/s/{y}")(handler)
    below.include_router(router, prefix="/q")
    mounting = APIRouter()
    mounting.mount("/mounted/{t}", below)
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(mounting, prefix="/inc")
    app.mount("/m/{tenant}", below)
    app.mount(
        "/st",
        Starlette(
            routes=[Route("/p/{k:int}", plain), Mount("/mm/{j}", routes=[Route("/i/{k}", plain)]), Host("{h}", below)]
        ),
    )
    app.add_route("/bare/{b}", plain)
    app.add_middleware(UsageMiddleware)
    port = serve(app)
    proxied = serve(app, root_path="/proxy")
    want = {
        "/v1/items/3": "/v1/items/{id}",
        "/v1/items/r/deep/3": "/v1/items/r/deep/{z}",
        "/v1/plain/3": "/v1/plain/{p}",
        "/m/acme/s/3": "/m/{tenant}/s/{y}",
        "/m/acme/q/items/3": "/m/{tenant}/q/items/{id}",
        "/inc/mounted/acme/s/1": "/inc/mounted/{t}/s/{y}",
        "/inc/mounted/acme/q/items/1": "/inc/mounted/{t}/q/items/{id}",
        "/st/p/3": "/st/p/{k}",
        "/st/mm/J/i/K": "/st/mm/{j}/i/{k}",
        "/st/s/3": "/st/s/{y}",
        "/bare/3": "/bare/{b}",
    }
    for server in (port, proxied):
        for path in want:
            assert ask(server, path) == 200, path
    assert {u.attributes.get("http.route"): u.quantity for u in usage} == dict.fromkeys(want.values(), 2)


def test_pipelined_requests_do_not_inherit_an_account(usage: Captured, serve: Callable[..., int]) -> None:
    app = FastAPI()

    @app.get("/known")
    @track_usage("calls")
    async def known() -> str:
        identify(account="acme")
        return "x"

    @app.get("/unknown")
    @track_usage("calls")
    async def unknown() -> str:
        return "x"

    app.add_middleware(UsageMiddleware)
    for implementation in ("httptools", "h11"):
        port = serve(app, http=implementation)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            head = "HTTP/1.1\r\nHost: x\r\n"
            connection.sendall(f"GET /known {head}\r\nGET /unknown {head}Connection: close\r\n\r\n".encode())
            while connection.recv(65536):
                pass
    assert {u.attributes["http.route"]: u.account for u in usage} == {"/known": "acme", "/unknown": None}
    assert usage.total("calls") == 4


def test_a_resolver_that_raises_breaks_no_request_and_names_nobody(
    usage: Captured, serve: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    def resolver(scope: Any) -> Any:
        if scope["path"] == "/mapping":
            return {"account": "acme", "plan": "pro"}
        if scope["path"] == "/nothing":
            return None
        if scope["path"] == "/wrong":
            return 7
        raise RuntimeError

    app = FastAPI()

    @app.get("/{path}")
    @track_usage("calls")
    def handler(path: str) -> str:
        return path

    app.add_middleware(UsageMiddleware, identify=resolver)
    port = serve(app)
    assert {ask(port, f"/{path}") for path in ("mapping", "nothing", "wrong", "raises")} == {200}
    assert {(u.account, u.plan): u.quantity for u in usage} == {("acme", "pro"): 1, (None, None): 3}
    assert "identify function raised" in caplog.text


def test_usage_without_a_route(usage: Captured, serve: Callable[..., int]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        record("calls", 2)
        await PlainTextResponse("x")(scope, receive, send)

    assert ask(serve(UsageMiddleware(app, identify=by_header)), "/any/where", account="acme") == 200
    assert rows(usage) == {("acme", "GET", None, None, None): 2}


async def test_scopes_pass_through_untouched(usage: Captured) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    for scope in ({"type": "of.an.extension"}, {"type": "websocket"}, {"type": "http", "method": "GET", "headers": []}):
        before = dict(scope)
        await UsageMiddleware(app)(scope, None, None)  # type: ignore[arg-type]
        assert seen[-1] is scope
        assert scope == before


def test_the_documented_api_keeps_its_schema(fresh: Runtime) -> None:
    def handler(item: int, q: Annotated[str | None, Header()] = None) -> dict[str, int]:
        """Reads."""
        return {"item": item}

    plain, metered = FastAPI(), FastAPI()
    plain.get("/{item}")(handler)
    metered.get("/{item}")(track_usage("calls")(handler))
    assert plain.openapi() == metered.openapi()


async def test_a_scope_keeps_no_call_behind(usage: Captured) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert CALL in scope
        raise ZeroDivisionError

    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(ZeroDivisionError):
        await UsageMiddleware(app, track=[track_usage("requests")])(scope, None, None)  # type: ignore[arg-type]
    assert CALL not in scope
    assert rows(usage) == {(None, "GET", None, 500, "ZeroDivisionError"): 1}
