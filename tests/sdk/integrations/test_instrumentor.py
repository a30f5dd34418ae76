"""`opentelemetry-instrument` around real servers, whose code does not name Tallymark."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import call
from tests.sdk.integrations.instrumented import Rows, instrumented, rows, wait_for

WHOSE = {
    "asgi": """
        from starlette.datastructures import Headers

        def whose(scope):
            account = Headers(scope=scope).get("account")
            return None if account is None else {"account": account}
    """,
    "wsgi": """
        def whose(environ):
            return {"account": environ.get("HTTP_ACCOUNT")}
    """,
    "django": """
        from django.conf import settings

        def whose(request):
            assert settings.configured
            return {"account": request.headers.get("account")}
    """,
}

FASTAPI = """
    from fastapi import FastAPI, HTTPException
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = FastAPI()

    @app.get("/items/{item}")
    def read(item: int):
        if item == 403:
            raise HTTPException(403)
        return {"item": item}

    inner = FastAPI()

    @inner.get("/things/{thing}")
    async def thing(thing: int):
        return {"thing": thing}

    app.mount("/inner", inner)
"""

FLASK = """
    import flask

    app = flask.Flask("shop")
    blueprint = flask.Blueprint("inner", "shop")

    @app.get("/items/<int:item>")
    def read(item):
        if item == 403:
            flask.abort(403)
        return {"item": item}

    @blueprint.get("/things/<thing>")
    def thing(thing):
        return {"thing": thing}

    app.register_blueprint(blueprint, url_prefix="/inner")
"""

DJANGO = """
    from django.http import HttpResponse, HttpResponseForbidden
    from django.urls import include, path

    def read(request, item):
        return HttpResponseForbidden() if item == 403 else HttpResponse(str(item))

    async def thing(request, thing):
        return HttpResponse(thing)

    urlpatterns = [path("items/<int:item>", read), path("inner/", include([path("things/<thing>", thing)]))]
"""
DJANGO_SETTINGS = """
    ALLOWED_HOSTS = ["*"]
    ROOT_URLCONF = "shop"
    SECRET_KEY = "x"
    MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
"""
DJANGO_WSGI = """
    from django.core.wsgi import get_wsgi_application
    app = get_wsgi_application()
"""
DJANGO_ASGI = DJANGO_WSGI.replace("wsgi", "asgi")
SITE = {
    "shop.py": DJANGO,
    "settings_of_shop.py": DJANGO_SETTINGS,
    "site_wsgi.py": DJANGO_WSGI,
    "site_asgi.py": DJANGO_ASGI,
}

UVICORN = ("-m", "uvicorn", "--host", "127.0.0.1", "--port", "{port}", "--lifespan", "off")
GUNICORN = ("-m", "gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "--worker-tmp-dir", ".")
WAITRESS = ("-m", "waitress", "--listen", "127.0.0.1:{port}")

TEMPLATES = {
    "asgi": ("/items/{item}", "/inner/things/{thing}"),
    "wsgi": ("/items/<int:item>", "/inner/things/<thing>"),
    "django": ("/items/<int:item>", "/inner/things/<thing>"),
}


def drive(port: int, kind: str, meters: tuple[str, ...]) -> Rows:
    """Sends requests, and says by what the client saw what they have to be counted as."""
    item, thing = TEMPLATES[kind]
    seen: Rows = {}
    for account, times in (("acme", 5), ("globex", 3), (None, 2)):
        headers = {} if account is None else {"account": account}
        for path, route in (("/items/1", item), ("/items/403", item), ("/inner/things/7", thing), ("/nowhere", None)):
            for _ in range(times):
                status = call(port, path, **headers).status
                for meter in meters:
                    key = (account, meter, route, status)
                    seen[key] = seen.get(key, 0) + 1
    assert {status for _, _, _, status in seen} == {200, 403, 404}
    return seen


@pytest.mark.parametrize(
    ("kind", "sources", "command"),
    [
        pytest.param("asgi", {"shop.py": FASTAPI}, (*UVICORN, "shop:app"), id="fastapi-uvicorn"),
        pytest.param(
            "asgi",
            {"shop.py": FASTAPI},
            (*GUNICORN, "--worker-class", "uvicorn_worker.UvicornWorker", "shop:app"),
            id="fastapi-gunicorn",
        ),
        pytest.param("wsgi", {"shop.py": FLASK}, (*GUNICORN, "shop:app"), id="flask-gunicorn"),
        pytest.param("wsgi", {"shop.py": FLASK}, (*GUNICORN, "--preload", "shop:app"), id="flask-gunicorn-preload"),
        pytest.param("wsgi", {"shop.py": FLASK}, (*WAITRESS, "shop:app"), id="flask-waitress"),
        pytest.param("django", SITE, (*GUNICORN, "site_wsgi:app"), id="django-wsgi"),
        pytest.param("django", SITE, (*UVICORN, "site_asgi:app"), id="django-asgi"),
    ],
)
def test_a_service_is_metered_without_a_change(
    collector: FakeCollector, tmp_path: Path, kind: str, sources: dict[str, str], command: tuple[str, ...]
) -> None:
    sources = {**sources, "usage_of_shop.py": WHOSE[kind]}
    with instrumented(
        tmp_path,
        sources,
        *command,
        TALLYMARK_ENDPOINT=collector.endpoint,
        DJANGO_SETTINGS_MODULE="settings_of_shop",
        TALLYMARK_IDENTIFY="usage_of_shop:whose",
        TALLYMARK_TRACK="requests, shop.calls",
    ) as service:
        want = drive(service.port, kind, ("requests", "shop.calls"))
        wait_for(collector, sum(want.values()), service)
    assert rows(collector) == want
    assert "tallymark" not in service.logged().lower()


@pytest.mark.parametrize(
    ("kind", "sources", "app"), [("asgi", {"shop.py": FASTAPI}, "shop:app"), ("django", SITE, "site_asgi:app")]
)
def test_what_a_signal_ends_has_delivered_everything(
    collector: FakeCollector, tmp_path: Path, kind: str, sources: dict[str, str], app: str
) -> None:
    with instrumented(
        tmp_path,
        {**sources, "usage_of_shop.py": WHOSE[kind]},
        *UVICORN[:-2],
        app,
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_EXPORT_INTERVAL="86400",
        TALLYMARK_SHUTDOWN_TIMEOUT="60",
        DJANGO_SETTINGS_MODULE="settings_of_shop",
        TALLYMARK_IDENTIFY="usage_of_shop:whose",
        TALLYMARK_TRACK="requests",
    ) as service:
        want = drive(service.port, kind, ("requests",))
        assert collector.requests == []
    assert {key: n for key, n in rows(collector).items() if key[1] == "requests"} == want, service.logged()


def test_a_fork_server_starts_nothing_before_it_forks(collector: FakeCollector, tmp_path: Path) -> None:
    config = """
        import threading
        from pathlib import Path

        def when_ready(server):
            names = [thread.name for thread in threading.enumerate()]
            Path("master").write_text(f"{names} {Path('state').exists()}")
    """
    with instrumented(
        tmp_path,
        {"shop.py": FLASK, "gunicorn.conf.py": config},
        *GUNICORN,
        "--preload",
        "shop:app",
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_TRACK="requests",
    ) as service:
        want = drive(service.port, "wsgi", ("requests",))
        wait_for(collector, sum(want.values()), service)
    assert (tmp_path / "master").read_text() == "['MainThread'] False"
    assert sum(collector.totals().values()) == sum(want.values())


WITH_MIDDLEWARE = {
    "asgi": """
    import tallymark
    from tallymark.integrations.asgi import UsageMiddleware
    tallymark.configure(interval=0.3)
    app.add_middleware(UsageMiddleware, identify=lambda scope: {"account": "own"}, track=[
        tallymark.track_usage("requests")])
    """,
    "asgi-outside": """
    import tallymark
    from tallymark.integrations.asgi import UsageMiddleware
    app = UsageMiddleware(app, lambda scope: {"account": "own"}, [tallymark.track_usage("requests")])
    """,
    "wsgi": """
    import tallymark
    from tallymark.integrations.flask import init_app
    tallymark.configure(interval=0.3)
    init_app(app, lambda environ: {"account": "own"}, [tallymark.track_usage("requests")])
    """,
    "django": """
    import tallymark
    tallymark.configure(interval=0.3)
    MIDDLEWARE.insert(0, "tallymark.integrations.django.UsageMiddleware")
    TALLYMARK_TRACK = [tallymark.track_usage("requests")]
    TALLYMARK_IDENTIFY = lambda request: {"account": "own"}
    """,
}


@pytest.mark.parametrize(
    ("added", "sources", "command"),
    [
        ("asgi", {"shop.py": FASTAPI}, (*UVICORN, "shop:app")),
        ("asgi-outside", {"shop.py": FASTAPI}, (*UVICORN, "shop:app")),
        ("wsgi", {"shop.py": FLASK}, (*WAITRESS, "shop:app")),
        ("django", SITE, (*WAITRESS, "site_wsgi:app")),
        ("django", SITE, (*UVICORN, "site_asgi:app")),
    ],
)
def test_what_has_the_middleware_already_is_counted_once_and_the_codes_word_counts(
    collector: FakeCollector, tmp_path: Path, added: str, sources: dict[str, str], command: tuple[str, ...]
) -> None:
    kind = added.split("-")[0]
    place = "settings_of_shop.py" if kind == "django" else "shop.py"
    sources = {**sources, place: sources[place] + WITH_MIDDLEWARE[added], "usage_of_shop.py": WHOSE[kind]}
    with instrumented(
        tmp_path,
        sources,
        *command,
        TALLYMARK_ENDPOINT=collector.endpoint,
        DJANGO_SETTINGS_MODULE="settings_of_shop",
        TALLYMARK_IDENTIFY="usage_of_shop:whose",
        TALLYMARK_TRACK="requests",
    ) as service:
        want = drive(service.port, kind, ("requests",))
        wait_for(collector, sum(want.values()), service)
    own: Rows = {}
    for (_, meter, route, status), value in want.items():
        key = ("own", meter, route, status)
        own[key] = own.get(key, 0) + value
    assert rows(collector) == own


STATE = """
    import sys
    from fastapi import FastAPI
    from starlette.applications import Starlette
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

    app = FastAPI()

    def is_configured():
        return "tallymark" in sys.modules and sys.modules["tallymark.runtime"].current().settings is not None

    @app.get("/state")
    def state():
        return {
            "patched": hasattr(Starlette.__call__, "__wrapped__"),
            "configured": is_configured(),
            "httpx": HTTPXClientInstrumentor().is_instrumented_by_opentelemetry,
        }
"""


def state_of(collector: FakeCollector, folder: Path, **env: str) -> tuple[dict[str, bool], str]:
    with instrumented(
        folder,
        {"state.py": STATE},
        *UVICORN,
        "state:app",
        **{"TALLYMARK_ENDPOINT": collector.endpoint, "TALLYMARK_TRACK": "requests", **env},
    ) as service:
        found = json.loads(call(service.port, "/state").body)
    return found, service.logged()


def test_settings_that_cannot_work_are_logged_in_full_and_stop_nothing(
    collector: FakeCollector, tmp_path: Path
) -> None:
    state, log = state_of(
        collector, tmp_path, TALLYMARK_TIMEOUT="never", TALLYMARK_EXPORT_INTERVAL="often", TALLYMARK_TRACK="a,1 b"
    )
    assert state == {"patched": True, "configured": False, "httpx": True}
    for part in ("TALLYMARK_TIMEOUT='never'", "TALLYMARK_EXPORT_INTERVAL='often'", "TALLYMARK_TRACK: meter name '1 b'"):
        assert part in log
    assert "Traceback" not in log
    assert collector.stored == []


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"TALLYMARK_DISABLED": "true"}, {"patched": False, "configured": True, "httpx": True}),
        # What is silenced must be silent, whatever else is wrong.
        (
            {"TALLYMARK_DISABLED": "true", "TALLYMARK_TIMEOUT": "never"},
            {"patched": False, "configured": False, "httpx": True},
        ),
        (
            {"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "tallymark"},
            {"patched": False, "configured": False, "httpx": True},
        ),
    ],
)
def test_what_is_switched_off_patches_and_sends_nothing(
    collector: FakeCollector, tmp_path: Path, env: dict[str, str], want: dict[str, bool]
) -> None:
    state, _ = state_of(collector, tmp_path, **env)
    assert state == want
    assert collector.stored == []
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("nowhere.at.all:whose", "ModuleNotFoundError"),
        ("usage_of_shop:missing", "AttributeError"),
        ("usage_of_shop.whose", "must be package.module:function"),
        ("usage_of_shop:late", "at once: no `async`, no `yield`; where only an await tells whom it is for, call"),
        ("leaves:whose", "SystemExit"),
    ],
)
def test_a_resolver_that_cannot_be_imported_costs_the_account_alone(
    collector: FakeCollector, tmp_path: Path, place: str, reason: str
) -> None:
    whose = "async def late(environ): ..."
    with instrumented(
        tmp_path,
        {"shop.py": FLASK, "usage_of_shop.py": whose, "leaves.py": "raise SystemExit(3)"},
        *WAITRESS,
        "shop:app",
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_IDENTIFY=place,
        TALLYMARK_TRACK="requests",
    ) as service:
        assert [call(service.port, "/items/1", account="acme").status for _ in range(4)] == [200] * 4
        wait_for(collector, 4, service)
    assert rows(collector) == {(None, "requests", "/items/<int:item>", 200): 4}
    said = [line for line in service.logged().splitlines() if f"TALLYMARK_IDENTIFY='{place}'" in line]
    assert any(reason in line for line in said)
    assert any("usage is recorded without an account until" in line for line in said)


GRPC = """
    import asyncio, sys
    from concurrent.futures import ThreadPoolExecutor
    import grpc

    def echo(request, context):
        return request

    async def echo_async(request, context):
        return request

    def handlers(function):
        rpc = grpc.unary_unary_rpc_method_handler(function)
        return (grpc.method_handlers_generic_handler("shop.Shop", {"Echo": rpc}),)

    def whose(context):
        return {"account": dict(context.invocation_metadata()).get("account")}

    async def serve(port):
        server = grpc.aio.server(None, handlers(echo_async), interceptors=())
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    if __name__ == "__main__":
        kind, port = sys.argv[1:]
        if kind == "asyncio":
            asyncio.run(serve(port))
        else:
            server = grpc.server(ThreadPoolExecutor(2), handlers(echo), interceptors=[])
            server.add_insecure_port(f"127.0.0.1:{port}")
            server.start()
            server.wait_for_termination()
"""


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
def test_a_grpc_server_is_metered_without_a_change(collector: FakeCollector, tmp_path: Path, kind: str) -> None:
    with instrumented(
        tmp_path,
        {"shop.py": GRPC},
        "shop.py",
        kind,
        "{port}",
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_IDENTIFY="shop:whose",
        TALLYMARK_TRACK="requests",
    ) as service:
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            echo = channel.unary_unary("/shop.Shop/Echo")
            for account, times in (("acme", 4), ("globex", 2)):
                for _ in range(times):
                    assert echo(b"x", metadata=[("account", account)], wait_for_ready=True, timeout=30) == b"x"
        wait_for(collector, 6, service)
    accounts = {account: value for (account, *_), value in rows(collector).items()}
    assert accounts == {"acme": 4, "globex": 2}
