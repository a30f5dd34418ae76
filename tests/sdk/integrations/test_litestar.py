"""Litestar, by the same middleware: around the application, or inside it for the routes alone."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import Controller, Litestar, Request, Response, Router, get, post
from litestar.exceptions import NotAuthorizedException
from litestar.middleware import DefineMiddleware

from tallymark import identify, track_usage
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.testing import Captured
from tests.sdk.integrations.clients import call, rows, uvicorn_serving


class Things(Controller):
    path = "/things"

    @get("/{thing:int}")
    @track_usage("calls")
    async def read(self, request: Request[Any, Any, Any]) -> dict[str, int]:
        return {"thing": request.path_params["thing"]}

    @post()
    @track_usage("calls")
    async def create(self) -> str:
        return "made"

    @get("/moved")
    @track_usage("calls")
    async def moved(self) -> Response[str]:
        return Response("elsewhere", status_code=203)


@get("/sync", sync_to_thread=True)
@track_usage("calls")
def in_a_thread() -> str:
    identify(account="threaded")
    return "x"


@get("/refused")
@track_usage("calls")
async def refused() -> None:
    raise NotAuthorizedException


ROUTES: list[Any] = [Router("/v1", route_handlers=[Things]), in_a_thread, refused]


@pytest.mark.parametrize("place", ["around", "inside"])
def test_litestar(usage: Captured, place: str) -> None:
    requests = track_usage("requests")
    if place == "around":
        app: Any = UsageMiddleware(Litestar(ROUTES, openapi_config=None), track=[requests])
    else:
        inside = DefineMiddleware(UsageMiddleware, track=[requests])
        app = Litestar(ROUTES, middleware=[inside], openapi_config=None)
    with uvicorn_serving(app) as port:
        asked = ["/v1/things/1", "/v1/things/moved", "/sync", "/refused", "/v1/things/1/no", "/v1/things/x"]
        seen = {("GET", path): call(port, path).status for path in asked}
        seen["POST", "/v1/things"] = call(port, "/v1/things", "POST").status
        seen["POST", "/sync"] = call(port, "/sync", "POST").status
    assert list(seen.values()) == [200, 203, 200, 401, 404, 404, 201, 405]
    handled = {
        (None, "GET", "/v1/things/{thing}", 200, None): 1,
        (None, "GET", "/v1/things/moved", 203, None): 1,
        ("threaded", "GET", "/sync", 200, None): 1,
        (None, "GET", "/refused", 401, None): 1,
        (None, "POST", "/v1/things", 201, None): 1,
    }
    unrouted = {(None, "GET", None, 404, None): 2, (None, "POST", None, 405, None): 1}
    assert rows(usage, "calls") == handled
    assert rows(usage, "requests") == (handled | unrouted if place == "around" else handled)
