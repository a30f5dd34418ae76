"""A handler notices nothing, and every call counts once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import typing
from decimal import Decimal
from typing import Any

import pytest

from tallymark import identify, record, track_usage
from tallymark.calls import HttpCall
from tallymark.errors import DeclarationError
from tallymark.integrations.serving import serving
from tallymark.runtime import Runtime, using
from tallymark.testing import capture_usage


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


class Answer:
    def __init__(self, status_code: object) -> None:
        self.status_code = status_code


class HTTPError(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class Get(HttpCall):
    def method(self) -> str:
        return "GET"

    def route(self) -> str:
        return "/v1/{id}"

    def default_status(self) -> int:
        return 201


HTTP = {"http.request.method": "GET", "http.route": "/v1/{id}"}


def only(usage: Any) -> dict[str, Any]:
    (one,) = usage
    return {k: v for k, v in one.attributes.items() if k != "tallymark.account.id"}


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1, True, None, "3", 2**63])
def test_a_quantity_that_cannot_be_counted_is_refused_alone(bad: object, caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("tokens", quantity=lambda r: r)
    def handler(value: Any) -> Any:
        return value

    with capture_usage() as usage:
        assert handler(bad) is bad
        handler(4)
    assert usage.total("tokens") == 4
    assert usage.refused() == {"tokens": 1}
    assert "refused" in caplog.text


class Nasty:
    @property
    def status_code(self) -> int:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__

    def __len__(self) -> int:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


def raises(error: BaseException) -> Any:
    def function(result: object) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    "error", [ValueError(), RecursionError(), SystemExit(), asyncio.CancelledError(), GeneratorExit()]
)
def test_functions_of_the_result_may_raise_anything(error: BaseException) -> None:
    nasty = Nasty()

    @track_usage("a", quantity=raises(error))
    @track_usage("b", attributes=raises(error))
    @track_usage("c", attributes=lambda r: {"x": r, "y": 1})
    @track_usage("d", attributes=lambda r: r)
    def handler() -> Nasty:
        return nasty

    with capture_usage() as usage, serving(Get()):
        assert handler() is nasty
    assert {m: usage.total(m) for m in "abcd"} == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert usage.refused() == {"a": 1}
    assert {u.attributes.get("y") for u in usage if u.meter == "c"} == {1}


def test_a_call_that_cannot_be_described_counts() -> None:
    class Broken(HttpCall):
        def route(self) -> str:
            raise RuntimeError

    @track_usage("m", attributes={"kept": 1})
    def handler() -> int:
        record("n")
        return 1

    with capture_usage() as usage, serving(Broken()):
        assert handler() == 1
    assert usage.total("m") == usage.total("n") == 1


async def test_a_broken_recorder_breaks_no_handler(fresh: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken")

    @track_usage("m", quantity=lambda r: r)
    async def handler(value: Any) -> Any:
        return value

    @track_usage("m", quantity=lambda r: 1)
    def fails() -> None:
        raise KeyError

    broken = Runtime(meters=fresh.meters)
    broken.recorder = Broken()  # type: ignore[assignment]
    with using(broken):
        assert await handler(7) == 7
        assert await handler("no number") == "no number"
        record("m")
        with pytest.raises(KeyError):
            fails()
        broken.recorder = fresh.recorder
    assert "RuntimeError" in caplog.text


def test_a_log_handler_that_raises_breaks_no_handler() -> None:
    import logging

    class Raising(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            raise RuntimeError

    @track_usage("m", quantity=lambda r: None)
    def handler() -> int:
        return 1

    logger = logging.getLogger("tallymark")
    logger.addHandler(raising := Raising())
    try:
        with capture_usage():
            assert handler() == 1
            identify(account="")
    finally:
        logger.removeHandler(raising)


def test_signature_and_identity_are_kept() -> None:
    def handler(a: int, /, b: str = "x", *, c: float) -> bytes:
        """What it does."""
        return b""

    async def asynchronous(a: int) -> None: ...

    for function in (handler, asynchronous):
        wrapped: Any = track_usage("m")(function)
        assert inspect.signature(wrapped) == inspect.signature(function)
        assert wrapped.__wrapped__ is function
        assert wrapped.__name__ == function.__name__
        assert wrapped.__doc__ == function.__doc__
        assert typing.get_type_hints(wrapped) == typing.get_type_hints(function)
        assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(function)


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


def test_a_call_inside_a_call_of_its_meter_is_part_of_it() -> None:
    @track_usage("m")
    def inner() -> None: ...

    @track_usage("m")
    def outer() -> None:
        inner()
        inner()

    with capture_usage() as usage:
        outer()
        assert usage.total("m") == 1
        inner()
    assert usage.total("m") == 2


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
