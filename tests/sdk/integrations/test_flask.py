"""Flask behind a threaded server, and behind gunicorn's workers as a service of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import flask
import pytest
from flask.views import MethodView

from tallymark import identify, measure, track_usage
from tallymark.integrations.flask import init_app
from tallymark.testing import Captured
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import Answer, ask, call, eventually, rows
from tests.sdk.integrations.wsgi_servers import wsgi_serving


class ShelfView(MethodView):
    decorators = [track_usage("calls")]  # noqa: RUF012 - Flask's own way

    def get(self, shelf: int) -> str:
        return str(shelf)


@track_usage("chunks", measure.items)
def chunks() -> Iterator[str]:
    for number in range(3):
        yield f"{number} {flask.request.path}\n"


def shop() -> flask.Flask:
    app = flask.Flask("shop")
    things = flask.Blueprint("things", "things", url_prefix="/things")

    @app.before_request
    def whose() -> Any:
        identify(account=flask.request.headers.get("account"))
        return ("who?", 401) if "account" not in flask.request.headers else None

    @things.get("/<int:thing>")
    @track_usage("calls")
    def read(thing: int) -> Any:
        if thing == 404:
            flask.abort(404)
        if thing == 409:
            raise LookupError
        if thing == 500:
            raise ZeroDivisionError
        return {"thing": thing}

    @things.post("/")
    @track_usage("calls")
    def create() -> Any:
        flask.request.get_data()
        return {"made": True}, 201

    @things.put("/")
    @track_usage("calls")
    async def replace() -> Any:
        flask.request.get_data()
        return "replaced", "202 Accepted", {"x-a": "b"}

    @things.get("/moved")
    @track_usage("calls")
    def moved() -> Any:
        return flask.redirect("/things/1")

    @things.get("/stream/<name>")
    def stream(name: str) -> Any:
        return flask.Response(flask.stream_with_context(chunks()), status=206)

    @things.get("/inner")
    def inner() -> str:
        return str(compute())

    @track_usage("calls")
    def compute() -> tuple[int, int]:
        return 3, 404

    @app.errorhandler(LookupError)
    def conflict(error: LookupError) -> Any:
        return "conflict", 409

    app.register_blueprint(things, url_prefix="/v1/things")
    app.add_url_rule("/shelves/<int:shelf>", view_func=ShelfView.as_view("shelves"))
    return app


def track() -> Any:
    return [
        track_usage("requests"),
        track_usage("egress", measure.response_bytes),
        track_usage("ingress", measure.request_bytes),
    ]


def test_each_request_is_counted_as_it_was_answered(usage: Captured, caplog: pytest.LogCaptureFixture) -> None:
    app = shop()
    init_app(app, track=track())
    asked: list[tuple[str, str, str | None, str | None, bytes | None]] = [
        ("GET", "/v1/things/1", "/v1/things/<int:thing>", None, None),
        ("GET", "/v1/things/404", "/v1/things/<int:thing>", None, None),
        ("GET", "/v1/things/409", "/v1/things/<int:thing>", None, None),
        ("GET", "/v1/things/500", "/v1/things/<int:thing>", "500", None),
        ("POST", "/v1/things/", "/v1/things/", None, b"x" * 5000),
        ("PUT", "/v1/things/", "/v1/things/", None, b"y" * 7),
        ("GET", "/v1/things/moved", "/v1/things/moved", None, None),
        ("GET", "/v1/things/inner", "/v1/things/inner", None, None),
        ("GET", "/v1/things/stream/s", "/v1/things/stream/<name>", None, None),
        ("HEAD", "/v1/things/1", "/v1/things/<int:thing>", None, None),
        ("OPTIONS", "/v1/things/1", "/v1/things/<int:thing>", None, None),
        ("DELETE", "/v1/things/1", None, None, None),
        ("GET", "/nowhere/1", None, None, None),
        ("GET", "/shelves/3", "/shelves/<int:shelf>", None, None),
    ]
    counted: dict[Any, int] = {}
    received = sent = 0
    with wsgi_serving(app, "werkzeug") as port:
        for method, path, route, failure, body in asked:
            answer = call(port, path, method, body, account="acme")
            counted["acme", method, route, answer.status, failure] = 1
            received += answer.size
            sent += answer.sent
        assert ask(port, "/v1/things/1") == 401
    assert rows(usage, "requests") == {**counted, (None, "GET", "/v1/things/<int:thing>", 401, None): 1}
    assert sorted(key[3] for key in counted) == [200] * 5 + [201, 202, 206, 302, 404, 404, 405, 409, 500]
    assert usage.total("egress", account="acme") == received > 500
    assert usage.total("ingress") == sent == 5007
    assert rows(usage, "chunks") == {("acme", "GET", "/v1/things/stream/<name>", 206, None): 3}
    assert {(key[1], key[2], key[3], key[4]): n for key, n in rows(usage, "calls").items()} == {
        ("GET", "/v1/things/<int:thing>", 200, None): 1,
        ("HEAD", "/v1/things/<int:thing>", 200, None): 1,
        ("GET", "/v1/things/<int:thing>", 404, None): 1,
        ("GET", "/v1/things/<int:thing>", 409, None): 1,
        ("GET", "/v1/things/<int:thing>", 500, "ZeroDivisionError"): 1,
        ("POST", "/v1/things/", 201, None): 1,
        ("PUT", "/v1/things/", 202, None): 1,
        ("GET", "/v1/things/moved", 302, None): 1,
        ("GET", "/v1/things/inner", 200, None): 1,
        ("GET", "/shelves/<int:shelf>", 200, None): 1,
    }


def test_the_route_of_an_error_that_a_debugger_is_to_see(usage: Captured) -> None:
    app = shop()
    app.testing = True
    init_app(app, track=track())
    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/v1/things/500", headers={"account": "acme"})
    assert rows(usage, "requests") == {("acme", "GET", "/v1/things/<int:thing>", 500, "ZeroDivisionError"): 1}


def test_threads_keep_their_accounts_apart(usage: Captured) -> None:
    app = shop()
    init_app(app, track=track())
    accounts = [f"account-{n}" for n in range(8)] * 5
    with wsgi_serving(app, "waitress") as port, ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda account: ask(port, "/v1/things/1", account=account), accounts)) == {200}
    for meter in ("requests", "calls"):
        assert {u.account: u.quantity for u in usage if u.meter == meter} == {f"account-{n}": 5 for n in range(8)}


SERVICE = """
    import flask, tallymark
    from tallymark import measure, track_usage
    from tallymark.integrations.flask import init_app

    tallymark.configure(interval=0.5)
    app = flask.Flask("service")
    init_app(
        app,
        identify=lambda environ: {"account": environ.get("HTTP_ACCOUNT")},
        track=[track_usage("requests"), track_usage("egress", measure.response_bytes)],
    )

    @app.post("/echo/<int:n>")
    @track_usage("calls")
    def echo(n):
        return flask.request.get_data() * n

    @app.get("/file")
    def file():
        return flask.send_file(__file__)
"""


def test_gunicorns_workers_lose_nothing_when_they_are_told_to_end(
    collector: FakeCollector, tmp_path: Path, state_dir: Path
) -> None:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "service:app", "-b", f"127.0.0.1:{port}", "--workers", "2"]
    environ = {**os.environ, "TALLYMARK_ENDPOINT": collector.endpoint, "TALLYMARK_STATE_DIR": str(state_dir)}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path("sdk").resolve()), str(tmp_path)])
    log = (tmp_path / "log").open("wb")
    service = subprocess.Popen([*command, "--threads", "2"], env=environ, cwd=tmp_path, stdout=log, stderr=log)
    try:
        answers: list[Answer] = []

        def is_up() -> bool:
            with suppress(ConnectionError):
                answers.append(call(port, "/nowhere"))
            return len(answers) == 1

        eventually(is_up)
        with ThreadPoolExecutor(4) as pool:
            echo = lambda n: call(port, f"/echo/{n % 3}", "POST", b"x" * n, account="a")  # noqa: E731
            answers += pool.map(echo, range(100))
        answers.append(call(port, "/file", account="a"))
        assert [answer.status for answer in answers] == [404, *[200] * 101]
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
        log.close()
    totals = collector.totals()
    assert totals["calls"] == 100
    assert totals["requests"] == 102, (tmp_path / "log").read_text()[-2000:]
    assert totals["egress"] == sum(answer.size for answer in answers)
