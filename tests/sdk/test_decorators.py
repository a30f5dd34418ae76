"""A handler notices nothing, and every call counts once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import time
import typing
import urllib.error
import urllib.request
from decimal import Decimal
from typing import Any

import pytest

from tallymark import identify, record, track_usage
from tallymark.assembly import Runtime
from tallymark.errors import DeclarationError
from tallymark.integrations.serving import serving
from tallymark.testing import capture_usage
from tests.sdk.handlers import HTTP, Answer, Get, HTTPError, only


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


def test_results_are_the_same_objects() -> None:
    thing = object()

    @track_usage("m")
    def sync(value: object) -> object:
        return value

    @track_usage("m")
    async def asynchronous(value: object) -> object:
        return value

    with capture_usage() as usage:
        assert sync(thing) is thing
        assert asyncio.run(asynchronous(thing)) is thing
    assert usage.total("m", account="acme") == 2


def test_exceptions_are_the_same_objects_and_count() -> None:
    error = KeyError("x")

    @track_usage("m", quantity=2)
    def fails() -> None:
        raise error

    with capture_usage() as usage, pytest.raises(KeyError) as caught:
        fails()
    assert caught.value is error
    assert usage.total("m") == 2
    assert only(usage) == {"error.type": "KeyError"}


async def test_a_cancelled_call_counts() -> None:
    @track_usage("m")
    async def waits() -> None:
        await asyncio.sleep(60)

    with capture_usage() as usage:
        with serving(Get()):
            task = asyncio.create_task(waits())
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert usage.total("m") == 1
    assert only(usage) == {**HTTP, "error.type": "CancelledError"}


def test_a_coroutine_that_never_runs_counts_nothing() -> None:
    @track_usage("m")
    async def handler() -> None: ...

    with capture_usage() as usage:
        handler().close()
    assert list(usage) == []


@pytest.mark.parametrize(
    ("result", "want"),
    [
        (None, {"http.response.status_code": 201}),
        ({"status_code": 500}, {"http.response.status_code": 201}),
        (Answer(404), {"http.response.status_code": 404}),
        (Answer(503), {"http.response.status_code": 503, "error.type": "503"}),
        (Answer("404"), {"http.response.status_code": 201}),
        (Answer(0), {"http.response.status_code": 201}),
        (HTTPError(404), {"http.response.status_code": 404}),
        (HTTPError(503), {"http.response.status_code": 503, "error.type": "HTTPError"}),
        (ValueError(), {"http.response.status_code": 500, "error.type": "ValueError"}),
    ],
)
def test_outcome_of_an_http_call(result: object, want: dict[str, object]) -> None:
    @track_usage("m")
    def handler() -> object:
        if isinstance(result, Exception):
            raise result
        return result

    with capture_usage() as usage, serving(Get()):
        identify(account="acme")
        if isinstance(result, Exception):
            with pytest.raises(type(result)):
                handler()
        else:
            assert handler() is result
    assert only(usage) == {**HTTP, **want}


def test_outside_http_a_status_means_nothing() -> None:
    @track_usage("m")
    def job() -> Answer:
        return Answer(503)

    with capture_usage() as usage:
        job()
    assert only(usage) == {}


def test_quantity_of_the_result() -> None:
    @track_usage("tokens", quantity=lambda r: r["tokens"], unit="{token}", attributes=lambda r: {"model": r["model"]})
    def complete(tokens: Any) -> dict[str, Any]:
        return {"tokens": tokens, "model": "large"}

    with capture_usage() as usage:
        for tokens in (3, 0.1, Decimal("0.2"), 0):
            complete(tokens)
    assert usage.total("tokens") == Decimal("3.3")
    (one,) = usage
    assert one.unit == "{token}"
    assert one.attributes["model"] == "large"


def test_a_quantity_of_the_result_needs_a_result() -> None:
    @track_usage("tokens", quantity=len)
    def fails() -> str:
        raise KeyError

    with capture_usage() as usage, pytest.raises(KeyError):
        fails()
    assert list(usage) == []


def test_signature_and_identity_are_kept() -> None:
    def handler(a: int, /, b: str = "x", *, c: float) -> bytes:
        """What it does."""
        return b""

    async def asynchronous(a: int) -> None: ...

    for function in (handler, asynchronous):
        wrapped: Any = track_usage("m")(function)
        # FastAPI up to 0.123 would look for the texts' names in the wrapper's module.
        assert inspect.signature(wrapped) == inspect.signature(function, eval_str=True)
        assert wrapped.__wrapped__ is function
        assert wrapped.__name__ == function.__name__
        assert wrapped.__doc__ == function.__doc__
        assert typing.get_type_hints(wrapped) == typing.get_type_hints(function)
        assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(function)


def test_annotations_that_name_nothing_yet_stay_as_they_are() -> None:
    def handler(a: NotDefinedYet) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert inspect.signature(track_usage("m")(handler)) == inspect.signature(handler)


async def test_methods_partials_and_callables() -> None:
    class Service:
        @track_usage("m")
        def method(self, x: int) -> int:
            return x

        @staticmethod
        @track_usage("m")
        async def static(x: int) -> int:
            return x

        @classmethod
        @track_usage("m")
        def of_class(cls, x: int) -> int:
            return x

    class Callable:
        async def __call__(self, x: int) -> int:
            await asyncio.sleep(0)
            return x

    with capture_usage() as usage:
        assert Service().method(1) == 1
        assert await Service.static(2) == 2
        assert Service.of_class(3) == 3
        assert await track_usage("m")(Callable())(4) == 4
        assert await track_usage("m")(functools.partial(asyncio.sleep, 0, 5))() == 5
        assert track_usage("m")(len)("six") == 3
    assert usage.total("m") == 6
    assert not [u for u in usage if "error.type" in u.attributes]


def test_what_has_no_calls_is_refused_at_declaration() -> None:
    class Handler: ...

    for thing in (staticmethod(len), classmethod(len), property(len)):
        with pytest.raises(DeclarationError, match="below"):
            track_usage("m")(thing)  # type: ignore[arg-type]
    for thing in (Handler, 7, None):
        with pytest.raises(DeclarationError, match="functions and methods"):
            track_usage("m")(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "quantity", [float("nan"), -1, True, "1", None, 2**63, 1e-31, Decimal("0.5000000000000000000000000000001")]
)
def test_a_bad_fixed_quantity_fails_at_declaration(quantity: Any) -> None:
    with pytest.raises(DeclarationError, match="quantity"):
        track_usage("m", quantity=quantity)


def test_attributes_of_another_kind_fail_at_declaration() -> None:
    with pytest.raises(DeclarationError, match="mapping"):
        track_usage("m", attributes=[("a", 1)])  # type: ignore[arg-type]


def test_units_left_out() -> None:
    @track_usage("calls")
    @track_usage("size", quantity=len)
    def handler() -> str:
        return "four"

    with capture_usage() as usage:
        handler()
    assert {u.meter: (u.unit, u.quantity) for u in usage} == {"calls": ("{request}", 1), "size": ("1", 4)}


def test_recording_without_a_handler() -> None:
    with capture_usage() as usage:
        record("m")
        record("m", 0.5, unit="GBy", attributes={"region": "eu"})
        record("not a meter", 1)
        record("m", "much")  # type: ignore[arg-type]
        record("m", 1, attributes=[1])  # type: ignore[arg-type]
        record("m", 1, unit="x" * 64)
        with serving(Get()):
            record("in.request")
    assert usage.total("m") == Decimal("2.5")
    assert {u.unit for u in usage if u.meter == "m"} == {"1", "GBy"}
    (inside,) = (u for u in usage if u.meter == "in.request")
    assert inside.attributes == HTTP
    assert usage.refused() == {"m": 1}


def test_dimensions_remembered_are_bounded() -> None:
    @track_usage("m", attributes=lambda r: {"n": r})
    def handler(n: int) -> int:
        return n

    with capture_usage() as usage:
        for n in range(2_500):
            handler(n)
    assert usage.total("m") == 2_500
    assert len(list(usage)) == 2_500


def test_decorators_of_others_between() -> None:
    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return 2 * function(*args, **kwargs)

        return wrapper

    @track_usage("outer")
    @doubled
    @functools.lru_cache
    @track_usage("inner")
    def handler(n: int) -> int:
        return n

    with capture_usage() as usage:
        assert [handler(4), handler(4)] == [8, 8]
    assert (usage.total("outer"), usage.total("inner")) == (2, 1)
    assert list(inspect.signature(handler).parameters) == ["n"]


async def test_class_based_views_and_partial_methods() -> None:
    class View:
        def __init__(self, name: str) -> None:
            self.name = name

        @track_usage("m")
        async def get(self, n: int) -> tuple[str, int]:
            return self.name, n

        @track_usage("m")
        def items(self, n: int) -> typing.Iterator[int]:
            yield from range(n)

        one = functools.partialmethod(get, 1)

    class Derived(View):
        async def get(self, n: int) -> tuple[str, int]:
            return await super().get(n + 1)

    with capture_usage() as usage:
        assert await View("a").get(3) == ("a", 3)
        assert await Derived("b").get(3) == ("b", 4)
        assert await View("c").one() == ("c", 1)
        assert list(View("d").items(2)) == [0, 1]
        assert await track_usage("bound")(View("e").get)(5) == ("e", 5)
    assert (usage.total("m"), usage.total("bound")) == (5, 1)


def test_fastapi_sees_the_signature_and_runs_the_dependencies(serve: Any) -> None:
    import fastapi

    from tallymark.integrations.asgi import UsageMiddleware

    app = fastapi.FastAPI()
    app.add_middleware(UsageMiddleware, identify=lambda scope: {"account": "acme"})
    closed: list[str] = []

    @track_usage("sessions")
    def session() -> typing.Iterator[str]:
        try:
            yield "session"
        finally:
            closed.append("session")

    @track_usage("sessions")
    async def async_session() -> typing.AsyncIterator[str]:
        try:
            yield "async"
        finally:
            closed.append("async")

    @app.get("/items/{n}")
    @track_usage("m")
    async def read(
        n: int, s: str = fastapi.Depends(session), a: str = fastapi.Depends(async_session), q: str = "x"
    ) -> dict[str, Any]:
        return {"n": n, "s": s, "a": a, "q": q}

    with capture_usage() as usage:
        base = f"http://127.0.0.1:{serve(app)}"
        with urllib.request.urlopen(f"{base}/items/3?q=y", timeout=30) as answer:
            assert json.load(answer) == {"n": 3, "s": "session", "a": "async", "q": "y"}
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(f"{base}/items/no", timeout=30)
        deadline = time.monotonic() + 30  # the dependencies end after the answer
        while usage.total("sessions") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert usage.total("m", account="acme") == 1
    assert usage.total("sessions", account="acme") == len(closed) == 4  # a refused request had its dependencies too
