"""Whatever serves a request, the caller's baggage is found where the service accepts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from django.conf import settings as django_settings
from django.test import RequestFactory

from tallymark import runtime
from tallymark.assembly import Runtime
from tallymark.identity import current_identity
from tallymark.integrations.django import DjangoCall
from tallymark.integrations.grpc import UsageInterceptor
from tallymark.integrations.serving import Requests
from tallymark.integrations.wsgi import UsageMiddleware

ENTRY = "tallymark.account.id=acme,tallymark.plan=pro"


@pytest.fixture(autouse=True)
def accepting(fresh: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.active, "settings", SimpleNamespace(accepts_baggage=True, sends_baggage=False))


@pytest.fixture
def shutting_down() -> Iterator[list[Callable[[], object]]]:
    ends: list[Callable[[], object]] = []
    yield ends
    for end in ends:
        end()


def test_wsgi() -> None:
    seen = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        seen.append(current_identity().account)
        start_response("200 OK", [])
        return [b""]

    environ = {"REQUEST_METHOD": "GET", "wsgi.input": BytesIO(), "HTTP_BAGGAGE": ENTRY}
    answer: Any = UsageMiddleware(app)(environ, lambda *args: None)
    list(answer)
    answer.close()
    assert seen == ["acme"]


def test_django() -> None:
    if not django_settings.configured:
        django_settings.configure()
    request = RequestFactory().get("/", headers={"baggage": ENTRY})
    served: Any = Requests("django", None, ()).begin(DjangoCall(request), request)
    assert current_identity().account == "acme"
    served.end()
    assert current_identity().account is None


def test_grpc(shutting_down: list[Callable[[], object]]) -> None:
    seen = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            def answer(request: bytes, context: object) -> bytes:
                seen.append((current_identity().account, current_identity().plan))
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(futures.ThreadPoolExecutor(1), interceptors=[UsageInterceptor()])
    server.add_generic_rpc_handlers([Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    shutting_down.append(lambda: server.stop(None))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/package.Service/Method")
        ask(b"", metadata=[("baggage", ENTRY)], timeout=60)
        ask(b"", timeout=60)
    assert seen == [("acme", "pro"), (None, None)]
