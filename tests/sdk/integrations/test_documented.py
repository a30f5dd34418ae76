"""The page's snippets, run as they stand there; and what importing the SDK does not import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tallymark.testing import Captured
from tests.sdk.integrations.clients import call, uvicorn_serving
from tests.sdk.integrations.wsgi_servers import wsgi_serving

PAGE = Path("docs/frameworks.md").read_text(encoding="utf-8")


def snippet(heading: str) -> dict[str, Any]:
    """The names that the heading's snippet makes."""
    section = PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(found[1], heading, "exec"), names)
    return names


def test_fastapi(usage: Captured) -> None:
    with uvicorn_serving(snippet("FastAPI")["app"]) as port:
        answer = call(port, "/items/1", **{"x-api-key": "key-of-acme"})
        assert call(port, "/nowhere").status == 404
        assert call(port, "/items/2", **{"x-api-key": "nobody's"}).status == 200
    assert (usage.total("requests", account="acme"), usage.total("requests", account=None)) == (1, 2)
    assert usage.total("egress", account="acme") == answer.size > 0


def test_what_is_awaited(usage: Captured) -> None:
    with uvicorn_serving(snippet("Where only an await tells whom it is for")["app"]) as port:
        assert call(port, "/items/1", **{"x-api-key": "key-of-acme"}).status == 200
        assert call(port, "/items/2", **{"x-api-key": "nobody's"}).status == 200
        assert call(port, "/nowhere", **{"x-api-key": "key-of-acme"}).status == 404
    assert (usage.total("requests", account="acme"), usage.total("items", account="acme")) == (1, 1)
    assert (usage.total("requests", account=None), usage.total("items", account=None)) == (2, 1)


def test_flask(usage: Captured) -> None:
    with wsgi_serving(snippet("Flask")["app"], "werkzeug") as port:
        assert call(port, "/items/1", "POST", **{"x-api-key": "key-of-acme"}).status == 201
        assert call(port, "/items/1", "POST", **{"x-api-key": "nobody's"}).status == 201
    assert usage.total("requests", account="acme") == usage.total("items", account="acme") == 1


def test_grpc(usage: Captured) -> None:
    server = snippet("gRPC")["server"]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        channel.unary_unary("/a.B/C")(b"", metadata=[("x-api-key", "key-of-acme")])
    server.stop(5).wait()
    assert usage.total("requests", account="acme") == 1


def test_celery(usage: Captured) -> None:
    names = snippet("Celery")
    names["app"].conf.task_always_eager = True
    names["convert"].delay("four")
    assert (usage.total("jobs"), usage.total("pages")) == (1, 4)


def test_django() -> None:
    names = snippet("Django")
    assert names["MIDDLEWARE"][0] == "tallymark.integrations.django.UsageMiddleware"


def test_no_example_bills_a_credential() -> None:
    """What a request brings along to show who it is becomes an account by a look-up alone."""
    pages = [*Path("docs").glob("*.md"), Path("README.md"), *Path("examples").glob("*.py")]
    assert len(pages) > 15
    for page in pages:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"""["']account["']\s*:""", line):
                assert not re.search(r"api.?key|authorization|\btoken\b", line, re.IGNORECASE) or "CUSTOMERS" in line, (
                    line
                )


def test_the_sdk_imports_no_framework() -> None:
    source = """
import sys, tallymark
frameworks = {"celery", "django", "fastapi", "flask", "grpc", "litestar", "starlette", "werkzeug"}
assert not frameworks & set(sys.modules), frameworks & set(sys.modules)
import tallymark.integrations.asgi, tallymark.integrations.wsgi
assert not frameworks & set(sys.modules), frameworks & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
