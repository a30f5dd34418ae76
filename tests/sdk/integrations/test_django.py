"""Django under WSGI and ASGI servers: sync and async views, classes, streams, and what no view has answered."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from http.client import IncompleteRead
from typing import Any
from wsgiref.util import setup_testing_defaults

import django
import pytest
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.test import override_settings

from tallymark import track_usage
from tallymark.integrations import asgi, wsgi
from tallymark.testing import Captured
from tests.sdk.integrations.clients import Answer, call, eventually, leave_midway, rows, uvicorn_serving
from tests.sdk.integrations.wsgi_servers import wsgi_serving

SITE = "tests.sdk.integrations.django_site"
MIDDLEWARE = ["tallymark.integrations.django.UsageMiddleware", "django.middleware.common.CommonMiddleware"]

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=SITE,
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=MIDDLEWARE,
        TALLYMARK_IDENTIFY=f"{SITE}.whose",
        TALLYMARK_TRACK=f"{SITE}.TRACKED",
        LOGGING_CONFIG=None,
        SECRET_KEY="tests",
    )
    django.setup()

ASKED: list[tuple[str, str, str | None, bytes | None]] = [
    ("GET", "/v1/things/1/", "/v1/things/<int:thing>/", None),
    ("POST", "/v1/things/201/", "/v1/things/<int:thing>/", b"x" * 70_000),
    ("GET", "/v1/things/404/", "/v1/things/<int:thing>/", None),
    ("GET", "/v1/things/403/", "/v1/things/<int:thing>/", None),
    ("GET", "/v1/things/500/", "/v1/things/<int:thing>/", None),
    ("GET", "/v1/async/1", r"/v1/async/(?P<thing>\w+)$", None),
    ("GET", "/v1/async/500", r"/v1/async/(?P<thing>\w+)$", None),
    ("GET", "/v1/identifying", "/v1/identifying", None),
    ("GET", "/nowhere/1", None, None),
    ("GET", "/child", "/child", None),
    ("POST", "/child", "/child", None),  # 405
    ("HEAD", "/dispatched", "/dispatched", None),
    ("GET", "/dispatched", "/dispatched", None),
    ("GET", "/async-view", "/async-view", None),
    ("GET", "/stream", "/stream", None),
    ("GET", "/stream-async", "/stream-async", None),
    ("GET", "/file", "/file", None),
    ("HEAD", "/file", "/file", None),
]
OWNERS = {
    r"/v1/async/(?P<thing>\w+)$": "async-owner",
    "/v1/identifying": "view-owner",
    "/stream": "stream-owner",
    "/stream-async": "stream-owner",
}


@contextmanager
def django_serving(kind: str) -> Iterator[int]:
    """ "wsgi" and "asgi" with Django's middleware alone, "both-…" with one around the whole application too."""
    if kind.endswith("asgi"):
        app: Any = get_asgi_application()
        with uvicorn_serving(asgi.UsageMiddleware(app) if kind == "both-asgi" else app) as port:
            yield port
    else:
        app = get_wsgi_application()
        with wsgi_serving(wsgi.UsageMiddleware(app) if kind == "both-wsgi" else app, "werkzeug") as port:
            yield port


@pytest.mark.parametrize("kind", ["wsgi", "asgi", "both-wsgi", "both-asgi"])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
def test_each_request_is_counted_as_it_was_answered(
    usage: Captured, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Answer] = []
    counted: dict[Any, int] = {}
    with django_serving(kind) as port:
        for method, path, route, body in ASKED:
            answers.append(call(port, path, method, body, account="acme"))
            status = answers[-1].status
            key = (OWNERS.get(str(route), "acme"), method, route, status, "500" if status == 500 else None)
            counted[key] = counted.get(key, 0) + 1
    assert [answer.status for answer in answers] == [
        *[200, 201, 404, 403, 500, 202, 500, 200, 404, 200, 405],
        *[200, 200, 200, 206, 200, 200, 200],
    ]
    assert rows(usage, "requests") == counted
    assert usage.total("egress") == sum(answer.size for answer in answers) > 3000
    assert usage.total("egress", account="stream-owner") == 600
    assert usage.total("ingress") == 70_000
    assert {key[1:4]: (key[0], n) for key, n in rows(usage, "chunks").items()} == {
        ("GET", "/stream", 206): ("stream-owner", 3),
        ("GET", "/stream-async", 200): ("stream-owner", 3),
    }
    assert {key[1:]: (key[0], n) for key, n in rows(usage, "calls").items()} == {
        ("GET", "/v1/things/<int:thing>/", 200, None): ("acme", 1),
        ("POST", "/v1/things/<int:thing>/", 201, None): ("acme", 1),
        ("GET", "/v1/things/<int:thing>/", 404, None): ("acme", 1),
        ("GET", "/v1/things/<int:thing>/", 403, None): ("acme", 1),
        ("GET", "/v1/things/<int:thing>/", 500, "ZeroDivisionError"): ("acme", 1),
        ("GET", r"/v1/async/(?P<thing>\w+)$", 202, None): ("async-owner", 1),
        ("GET", r"/v1/async/(?P<thing>\w+)$", 500, "LookupError"): ("async-owner", 1),
        ("GET", "/child", 200, None): ("acme", 1),
        ("HEAD", "/dispatched", 200, None): ("acme", 1),
        ("GET", "/dispatched", 200, None): ("acme", 1),
        ("GET", "/async-view", 200, None): ("acme", 1),
    }


@pytest.mark.parametrize("kind", ["asgi", "both-asgi"])
def test_a_client_that_goes_away(usage: Captured, kind: str) -> None:
    with django_serving(kind) as port:
        read = leave_midway(port, "/forever", 60_000, account="acme")
        eventually(lambda: usage.total("requests") == 1)
    assert rows(usage, "requests") == {("acme", "GET", "/forever", 200, "IncompleteAnswerError"): 1}
    assert usage.total("egress") > read * 0.9


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Django's own
@pytest.mark.parametrize("kind", ["asgi", "both-asgi"])
def test_an_answer_that_breaks_off(usage: Captured, kind: str) -> None:
    with django_serving(kind) as port:
        with pytest.raises(IncompleteRead):
            call(port, "/breaking", account="acme")
        eventually(lambda: usage.total("requests") == 1)
    assert rows(usage, "requests") == {("acme", "GET", "/breaking", 200, "ArithmeticError"): 1}
    assert usage.total("egress") == 100


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Django's own
async def test_an_answer_that_the_server_cannot_send(usage: Captured) -> None:
    messages = [{"type": "http.request", "body": b""}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        raise ConnectionResetError

    scope = {"type": "http", "method": "GET", "path": "/dispatched", "query_string": b""}
    with pytest.raises(ConnectionResetError):
        await get_asgi_application()({**scope, "headers": [(b"account", b"acme")]}, receive, send)
    gc.collect()
    assert rows(usage, "requests") == {("acme", "GET", "/dispatched", 200, "IncompleteAnswerError"): 1}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the file that nobody closes
@pytest.mark.parametrize(
    ("method", "path", "error"),
    [
        ("GET", "/dispatched", "IncompleteAnswerError"),
        ("GET", "/stream", "IncompleteAnswerError"),
        ("HEAD", "/dispatched", None),
        ("HEAD", "/file", None),
    ],
)
def test_an_answer_that_the_server_does_not_close(usage: Captured, method: str, path: str, error: str | None) -> None:
    """Werkzeug does not when the client resets the connection, as one may that has read all of the answer to a HEAD."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_ACCOUNT": "acme", "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    answer = copy_context().run(get_wsgi_application(), environ, lambda *_: None)  # a request stays in its context
    next(iter(answer))
    assert not rows(usage, "requests")
    del answer
    environ.clear()
    gc.collect()
    account, status = ("stream-owner", 206) if path == "/stream" else ("acme", 200)
    assert rows(usage, "requests") == {(account, method, path, status, error): 1}
    assert usage.total("egress") == (100 if path == "/stream" else 0)


def test_settings_may_be_the_objects_and_may_be_left_out(usage: Captured) -> None:
    given = override_settings(TALLYMARK_TRACK=None, TALLYMARK_IDENTIFY=lambda request: {"account": "given"})
    with given, django_serving("wsgi") as port:
        assert call(port, "/child").status == 200
    assert rows(usage) == {("given", "GET", "/child", 200, None): 1}


def test_a_middleware_inside_that_refuses(usage: Captured) -> None:
    refusing = [*MIDDLEWARE, f"{__name__}.refuse"]
    with override_settings(MIDDLEWARE=refusing), django_serving("asgi") as port:
        assert call(port, "/child", account="acme").status == 429
    assert rows(usage, "requests") == {("acme", "GET", None, 429, None): 1}


def refuse(get_response: Any) -> Any:
    return lambda request: HttpResponse("slow down", status=429)


def test_a_class_that_is_decorated_anew_for_each_request_keeps_one_tally(usage: Captured) -> None:
    class Handler:
        def get(self) -> int:
            return 1

    tracker = track_usage("anew")
    for _ in range(3):
        bound = Handler().get
        functools.update_wrapper(partial := functools.partial(bound), bound)
        assert tracker(partial)() == 1
    assert usage.total("anew") == 3
    assert tracker._tally.meter.uses == 1
