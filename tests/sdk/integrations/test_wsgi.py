"""Any WSGI application under real servers: each request once, by what its client saw."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from http.client import IncompleteRead
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

from tallymark import identify, measure, record, track_usage
from tallymark.calls import current_call
from tallymark.identity import current_identity
from tallymark.integrations.wsgi import UsageMiddleware
from tallymark.testing import Captured
from tests.sdk.integrations.clients import call, eventually, leave_midway, rows
from tests.sdk.integrations.wsgi_servers import wsgi_serving

SERVERS = ("werkzeug", "waitress", "wsgiref")
TEXT = [("Content-Type", "text/plain")]


def whose(environ: dict[str, Any]) -> dict[str, str] | None:
    account = environ.get("HTTP_ACCOUNT")
    return None if account is None else {"account": account}


def metered(app: Any, **kwargs: Any) -> UsageMiddleware:
    track = [
        track_usage("requests"),
        track_usage("egress", measure.response_bytes),
        track_usage("ingress", measure.request_bytes),
    ]
    return UsageMiddleware(app, identify=whose, track=track, **kwargs)


class Body:
    """An answer that knows how often it was closed."""

    closed: list[int]

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = iter(parts)
        self.closed = []

    def __iter__(self) -> Iterator[bytes]:
        return self._parts

    def close(self) -> None:
        self.closed.append(1)
        record("closings")


BODIES: list[Body] = []


def application(environ: dict[str, Any], start_response: Any) -> Any:
    path = environ["PATH_INFO"]
    source = environ["wsgi.input"]
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if path == "/list":
        start_response("200 OK", TEXT)
        return [b"x" * 1000]
    if path == "/parts":
        identify(account="late")
        start_response("206 Partial Content", TEXT)
        BODIES.append(Body([b"", b"a" * 10, b"", b"b" * 20]))
        return BODIES[-1]
    if path == "/empty":
        start_response("204 No Content", [])
        return []
    if path == "/write":
        write = start_response("202 Accepted", TEXT)
        write(b"w" * 100)
        return [b"r" * 11]
    if path == "/echo":
        start_response("200 OK", TEXT)
        return [source.read(length)]
    if path == "/lines":
        count = 0
        while count < length:
            count += len(source.readline(min(7, length - count)))
        start_response("200 OK", TEXT)
        return [str(count).encode()]
    if path == "/half":
        source.read(length // 2)
        start_response("413 Too Large", TEXT)
        return [b"no"]
    if path == "/changed":
        start_response("200 OK", TEXT)
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            start_response("503 Busy", TEXT, sys.exc_info())
        return [b"busy"]
    if path == "/file":
        start_response("200 OK", TEXT)
        return environ.get("wsgi.file_wrapper", FileWrapper)(open(__file__, "rb"))  # noqa: PTH123
    if path == "/raises":
        raise KeyError(path)
    start_response("200 OK", TEXT)
    return broken(path == "/broken-later")


@track_usage("streams")
def broken(later: bool) -> Iterator[bytes]:
    if later:
        yield b"half"
    raise ValueError(later)


@pytest.mark.parametrize("kind", SERVERS)
def test_each_request_is_counted_as_it_was_answered(usage: Captured, kind: str) -> None:
    BODIES.clear()
    received = sent = 0
    counted: dict[Any, int] = {}
    asked = [
        *[("GET", path, None) for path in ("/list", "/parts", "/empty", "/write", "/changed", "/file")],
        ("POST", "/echo", b"e" * 70_000),
        ("POST", "/lines", b"line\n" * 100),
        ("HEAD", "/list", None),
    ]
    # Both its sides are held to PEP 3333 by the standard library's validator, where the server itself passes.
    app = validator(application) if kind == "wsgiref" else application
    with wsgi_serving(metered(app), kind) as port:
        for method, path, body in asked:
            answer = call(port, path, method, body, account="acme", **{"content-type": "text/plain"})
            received += answer.size
            sent += answer.sent
            account = "late" if path == "/parts" else "acme"
            key = (account, method, None, answer.status, "503" if answer.status == 503 else None)
            counted[key] = counted.get(key, 0) + 1
    assert rows(usage, "requests") == counted
    assert received > 70_000
    assert usage.total("egress") == received
    assert usage.total("egress", account="late") == 30
    assert usage.total("ingress") == sent == 70_500
    assert [body.closed for body in BODIES] == [[1]]
    assert rows(usage, "closings") == {("late", "GET", None, None, None): 1}


@pytest.mark.parametrize("kind", ["werkzeug", "waitress"])
def test_errors_of_an_application(usage: Captured, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with wsgi_serving(metered(application), kind) as port:
        assert call(port, "/raises").status == 500
        assert call(port, "/broken-now").status == 500
        try:
            seen = call(port, "/broken-later").status
        except (IncompleteRead, ConnectionError):
            seen = 200
        assert seen == 200
        assert call(port, "/half", "POST", b"x" * 10).status == 413
    assert rows(usage, "requests") == {
        (None, "GET", None, 500, "KeyError"): 1,
        (None, "GET", None, 500, "ValueError"): 1,
        (None, "GET", None, 200, "ValueError"): 1,
        (None, "POST", None, 413, None): 1,
    }
    assert {key[3:]: n for key, n in rows(usage, "streams").items()} == {(500, "ValueError"): 1, (200, "ValueError"): 1}
    assert usage.total("ingress") == 5


@pytest.mark.parametrize("kind", ["werkzeug", "waitress"])
def test_a_client_that_goes_away(usage: Captured, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("streams")
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000
            time.sleep(0.001)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return endless()

    with wsgi_serving(metered(app), kind) as port:
        read = leave_midway(port, "/", 60_000, account="acme")
        eventually(lambda: usage.total("requests") == 1)
    assert rows(usage, "requests") == {("acme", "GET", None, 200, "IncompleteAnswerError"): 1}
    assert rows(usage, "streams") == {("acme", "GET", None, 200, "GeneratorExit"): 1}
    assert usage.total("egress") > read * 0.9


def test_requests_leave_nothing_behind_on_their_thread(usage: Captured) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        identify(account="acme")
        start_response("200 OK", TEXT)
        return iter([b"x"])

    answer = metered(app)({"REQUEST_METHOD": "GET"}, lambda status, headers: lambda data: None)
    assert current_call.get() is None
    assert current_identity().account is None
    assert list(answer) == [b"x"]
    assert rows(usage, "requests") == {("acme", "GET", None, 200, None): 1}


def test_an_answer_that_nobody_closes(usage: Captured) -> None:
    def application(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"three"
        yield b"four"

    def joining(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return [b"".join(metered(application)(environ, start_response))]  # a middleware around it that is not careful

    environ = {"REQUEST_METHOD": "GET", "HTTP_ACCOUNT": "acme", "wsgi.input": io.BytesIO()}
    assert joining(environ, lambda *args: None) == [b"threefour"]
    assert rows(usage, "requests") == {("acme", "GET", None, 200, None): 1}
    assert usage.total("egress") == 9
    next(metered(application)(environ, lambda *args: None))  # type: ignore[call-overload]
    assert rows(usage, "requests")["acme", "GET", None, 200, "IncompleteAnswerError"] == 1
    assert current_call.get() is None


def test_the_length_of_an_answer_of_one_part_stays_known(usage: Captured) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return [b"x"] if environ["PATH_INFO"] == "/list" else iter([b"x"])

    middleware = metered(app)
    answer: Any = middleware({"PATH_INFO": "/list"}, lambda status, headers: print)
    assert len(answer) == 1
    assert not hasattr(middleware({"PATH_INFO": "/iter"}, lambda status, headers: print), "__len__")


def test_a_route_that_the_service_knows_and_a_middleware_inside(usage: Captured) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        environ["route"] = "/things/{id}"
        calls()
        start_response("200 OK", TEXT)
        return [b"x"]

    @track_usage("calls")
    def calls() -> tuple[int, int]:
        return 3, 404

    inside = UsageMiddleware(app, identify=lambda environ: {"plan": "pro"}, track=[track_usage("requests")])
    with wsgi_serving(metered(inside, route=lambda environ: environ.get("route")), "werkzeug") as port:
        assert call(port, "/things/17", account="acme").status == 200
    assert rows(usage, "requests") == rows(usage, "calls") == {("acme", "GET", "/things/{id}", 200, None): 1}
    assert usage.total("egress", plan="pro") == 1


@pytest.mark.parametrize("route", [object(), b"/x", ["/x"], "/a\ud800", "/a\0", "/" + "a" * 5000])
def test_a_route_that_cannot_be_sent_is_left_out_and_the_request_counted(
    usage: Captured, caplog: pytest.LogCaptureFixture, route: Any
) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [b"x"]

    environ: dict[str, Any] = {"HTTP_ACCOUNT": "acme"}
    setup_testing_defaults(environ)
    answer: Any = metered(app, route=lambda environ: route)(environ, lambda *_: None)
    assert list(answer) == [b"x"]
    answer.close()
    assert rows(usage, "requests") == {("acme", "GET", None, 200, None): 1}
    assert usage.total("egress", account="acme") == 1
    assert "usage of meter requests is recorded without an attribute: attribute 'http.route'" in caplog.text
