"""gRPC servers, threaded and asyncio: each call once, by the status and the messages that its client saw."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tallymark import identify, measure, track_usage
from tallymark.integrations.grpc import AsyncUsageInterceptor, UsageInterceptor
from tallymark.testing import Captured
from tests.sdk.integrations.clients import eventually

KINDS = ("sync", "aio", "aio-with-sync-methods")
calls = track_usage("calls")


def whose(context: Any) -> dict[str, str] | None:
    account = dict(context.invocation_metadata()).get("account")
    return None if account is None else {"account": account}


class Shop:
    """Messages are texts; what a method does is what it is told to."""

    def __init__(self) -> None:
        self.left = threading.Event()

    @calls
    def unary(self, request: str, context: Any) -> Any:
        if request == "abort":
            context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if request == "code":
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        if request == "raise":
            raise LookupError
        if request == "code, raise":
            context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
            raise LookupError
        if request == "unavailable":
            context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        if request == "identify":
            identify(account="method-owner")
        return 7 if request == "not a text" else request * 10

    @calls
    def out(self, request: str, context: Any) -> Iterator[str]:
        for number in range(3):
            yield f"{request} {number}"
        while request == "forever":
            yield "more"
        if request == "abort":
            context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    @calls
    def into(self, requests: Iterator[str], context: Any) -> str:
        return "".join(requests)

    @calls
    def both(self, requests: Iterator[str], context: Any) -> Iterator[str]:
        for request in requests:
            yield request + "!"


class AsyncShop:
    """The same."""

    sync = Shop()

    @calls
    async def unary(self, request: str, context: Any) -> Any:
        await asyncio.sleep(0)
        if request in ("abort", "unavailable"):
            code = grpc.StatusCode.NOT_FOUND if request == "abort" else grpc.StatusCode.UNAVAILABLE
            await context.abort(code, "not here")
        return self.sync.unary.__wrapped__(self, request, context)  # type: ignore[attr-defined]

    @calls
    async def out(self, request: str, context: Any) -> Any:
        for number in range(3):
            yield f"{request} {number}"
        while request == "forever":
            yield "more"
            await asyncio.sleep(0)
        if request == "abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    @calls
    async def into(self, requests: Any, context: Any) -> str:
        return "".join([request async for request in requests])

    @calls
    async def both(self, requests: Any, context: Any) -> None:
        async for request in requests:  # the other way of writing
            await context.write(request + "!")


def written(message: Any) -> bytes:
    """grpcio's asyncio server makes bytes of a str itself."""
    return message if isinstance(message, bytes) else str.encode(message)


def handlers(shop: Any) -> Any:
    convert = {"request_deserializer": bytes.decode, "response_serializer": written}
    return grpc.method_handlers_generic_handler(
        "shop.Shop",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(shop.unary, **convert),
            "Out": grpc.unary_stream_rpc_method_handler(shop.out, **convert),
            "In": grpc.stream_unary_rpc_method_handler(shop.into, **convert),
            "Both": grpc.stream_stream_rpc_method_handler(shop.both, **convert),
        },
    )


def track() -> Any:
    return [
        track_usage("requests"),
        track_usage("egress", measure.response_bytes),
        track_usage("ingress", measure.request_bytes),
    ]


@contextmanager
def grpc_serving(kind: str, times: int = 1) -> Iterator[str]:
    """The address of a server; at the end every call has ended."""
    options = [("grpc.so_reuseport", 0)]
    if kind == "sync":
        interceptors = [UsageInterceptor(identify=whose, track=track()) for _ in range(times)]
        server = grpc.server(ThreadPoolExecutor(8), interceptors=interceptors, options=options)
        server.add_generic_rpc_handlers((handlers(Shop()),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(5).wait()
        return
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        found["loop"] = asyncio.get_running_loop()
        asynchronous = [AsyncUsageInterceptor(identify=whose, track=track()) for _ in range(times)]
        server = grpc.aio.server(ThreadPoolExecutor(8), interceptors=asynchronous, options=options)
        server.add_generic_rpc_handlers((handlers(AsyncShop() if kind == "aio" else Shop()),))
        found["port"] = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(5)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield f"127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join()


class Client:
    """Knows what it has sent, what came back, and how each call ended."""

    def __init__(self, address: str, account: str | None = "acme") -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.metadata = [] if account is None else [("account", account)]
        self.sent = self.received = 0

    def _out(self, text: str) -> bytes:
        self.sent += len(text.encode())
        return text.encode()

    def _in(self, data: bytes) -> str:
        self.received += len(data)
        return data.decode()

    def call(self, method: str, *requests: str, **kwargs: Any) -> str:
        """The status's name."""
        way = {"request_serializer": self._out, "response_deserializer": self._in}
        try:
            if method == "Out":
                list(self.channel.unary_stream(f"/shop.Shop/{method}", **way)(requests[0], metadata=self.metadata))
            elif method in ("In", "Both"):
                make = self.channel.stream_unary if method == "In" else self.channel.stream_stream
                answer = make(f"/shop.Shop/{method}", **way)(iter(requests), metadata=self.metadata, **kwargs)
                if method == "Both":
                    list(answer)
            else:
                self.channel.unary_unary(f"/shop.Shop/{method}", **way)(requests[0], metadata=self.metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


def rows(usage: Captured, meter: str) -> dict[tuple[Any, ...], Any]:
    """(account, method, status, error type) -> quantity"""
    names = ("rpc.method", "rpc.response.status_code", "error.type")
    found = [u for u in usage if u.meter == meter]
    assert {u.attributes["rpc.system.name"] for u in found} <= {"grpc"}
    return {(u.account, *(u.attributes.get(name) for name in names)): u.quantity for u in found}


@pytest.mark.parametrize("kind", KINDS)
def test_each_call_is_counted_as_it_was_answered(usage: Captured, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = [
        ("Unary", ("hello",), "OK", None),
        ("Unary", ("abort",), "NOT_FOUND", None),
        ("Unary", ("code",), "RESOURCE_EXHAUSTED", None),
        ("Unary", ("raise",), "UNKNOWN", "LookupError"),
        ("Unary", ("code, raise",), "FAILED_PRECONDITION", None),
        ("Unary", ("unavailable",), "UNAVAILABLE", "UNAVAILABLE"),
        ("Out", ("a",), "OK", None),
        ("Out", ("abort",), "DATA_LOSS", "DATA_LOSS"),
        ("In", ("x", "yy", "zzz"), "OK", None),
        ("Both", ("ä", "b"), "OK", None),
    ]
    with grpc_serving(kind) as address:
        client = Client(address)
        for method, requests, status, _ in asked:
            assert client.call(method, *requests) == status, (method, requests)
        assert client.call("Nothing", "") == "UNIMPLEMENTED"
        owner = Client(address)
        assert owner.call("Unary", "identify") == "OK"
        client.channel.close()
        owner.channel.close()
    counted: dict[Any, int] = {("method-owner", "shop.Shop/Unary", "OK", None): 1}
    for method, _, status, failure in asked:
        key = ("acme", f"shop.Shop/{method}", status, failure)
        counted[key] = counted.get(key, 0) + 1
    assert rows(usage, "calls") == counted
    counted["acme", "_OTHER", "UNIMPLEMENTED", "UNIMPLEMENTED"] = 1
    assert rows(usage, "requests") == counted
    assert usage.total("egress", account="acme") == client.received > 50
    assert usage.total("egress", account="method-owner") == owner.received == 80
    assert usage.total("ingress") == client.sent + owner.sent


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_client_that_goes_away_midway(usage: Captured, kind: str) -> None:
    with grpc_serving(kind) as address, grpc.insecure_channel(address) as channel:
        for account in ("acme", "globex"):
            answer = channel.unary_stream("/shop.Shop/Out")(b"forever", metadata=[("account", account)])
            assert [next(answer) for _ in range(5)][-1] == b"more"
            answer.cancel()
        late = channel.unary_stream("/shop.Shop/Out")(b"forever", metadata=[("account", "acme")], timeout=1)
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            list(late)
        eventually(lambda: usage.total("requests") == 3)
        eventually(lambda: usage.total("calls") == 3)
    ended = rows(usage, "requests")
    assert ended["globex", "shop.Shop/Out", "CANCELLED", None] == 1
    # A deadline that has passed is on the server what its clock says, or the client's giving up.
    assert sum(n for key, n in ended.items() if key[0] == "acme") == 2
    assert {key[2] for key in ended} <= {"CANCELLED", "DEADLINE_EXCEEDED"}
    assert usage.total("calls", account="acme") == 2
    assert {key[3] for key in rows(usage, "calls")} <= {"GeneratorExit", "CancelledError"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_cannot_be_written(usage: Captured, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with grpc_serving(kind) as address:
        client = Client(address)
        seen = client.call("Unary", "not a text")
        client.channel.close()
    assert seen == "INTERNAL" if kind == "sync" else "UNKNOWN"
    assert {key[1:3]: n for key, n in rows(usage, "requests").items()} == {("shop.Shop/Unary", seen): 1}


@pytest.mark.parametrize("kind", KINDS)
def test_two_interceptors_are_one_call(usage: Captured, kind: str) -> None:
    with grpc_serving(kind, times=2) as address:
        client = Client(address)
        assert client.call("Unary", "hello") == client.call("Out", "a") == client.call("Both", "b") == "OK"
        client.channel.close()
    assert set(rows(usage, "requests").values()) == {1}
    assert usage.total("requests", account="acme") == usage.total("requests") == 3
    assert usage.total("egress") == client.received


@pytest.mark.parametrize("kind", KINDS)
def test_threads_of_a_pool_keep_accounts_apart(usage: Captured, kind: str) -> None:
    accounts = [f"account-{n}" for n in range(8)] * 5
    with grpc_serving(kind) as address:
        clients = [Client(address, account) for account in accounts]
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda client: client.call("Unary", "hello"), clients)) == {"OK"}
        anonymous = Client(address, None)
        assert anonymous.call("Unary", "hello") == "OK"
        for client in (*clients, anonymous):
            client.channel.close()
    want = {**{f"account-{n}": 5 for n in range(8)}, None: 1}
    for meter in ("requests", "calls"):
        assert {u.account: u.quantity for u in usage if u.meter == meter} == want


def test_a_billable_function_sees_grpcs_number(usage: Captured) -> None:
    successes = track_usage("successes", billable=lambda call: call.status == 0)
    server = grpc.server(ThreadPoolExecutor(2), interceptors=[UsageInterceptor(track=[successes])])
    server.add_generic_rpc_handlers((handlers(Shop()),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = Client(f"127.0.0.1:{port}")
    assert [client.call("Unary", text) for text in ("a", "abort", "b")] == ["OK", "NOT_FOUND", "OK"]
    client.channel.close()
    server.stop(5).wait()
    assert usage.total("successes") == 2


class Anything(grpc.GenericRpcHandler):
    """Serves methods of whatever name a client makes up."""

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


def test_a_method_of_a_generic_handler_whose_name_is_too_long_is_counted_without_it(
    usage: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    interceptors = [UsageInterceptor(identify=whose, track=track_usage("requests"))]
    server = grpc.server(ThreadPoolExecutor(4), interceptors=interceptors, options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("/a.B/C", "/a.B/" + "x" * 2000, "/a.B/" + "x" * 2000):
            channel.unary_unary(method)(b"x", metadata=[("account", "acme")], timeout=60)
    server.stop(5).wait()
    assert {u.attributes.get("rpc.method"): u.quantity for u in usage} == {"a.B/C": 1, None: 2}
    assert {(u.account, u.attributes["rpc.response.status_code"]) for u in usage} == {("acme", "OK")}
    assert usage.refused() == {}
    assert "usage of meter requests is recorded without an attribute: attribute 'rpc.method'" in caplog.text
