"""Whatever a handler returns or raises, and whatever is broken around it, it notices nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from tallymark import identify, record, track_usage
from tallymark.assembly import Runtime
from tallymark.calls import HttpCall
from tallymark.integrations.serving import serving
from tallymark.runtime import new_runtime, using
from tallymark.testing import capture_usage
from tests.sdk.handlers import Get


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


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

    broken = new_runtime(meters=fresh.meters)
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


def test_what_records_in_the_midst_of_recording_evidence() -> None:
    """As a finalizer may, or a signal's handler: no lock may be waiting for itself."""
    other = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_span("other")

    class Interrupted(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            return True

        def set_attribute(self, key: str, value: object) -> None:
            with trace.use_span(other):
                record("m")

    @track_usage("m")
    def handler() -> None: ...

    with capture_usage() as usage, trace.use_span(Interrupted(trace.INVALID_SPAN_CONTEXT)):
        handler()
    # The account and the quantity were written, and each time something else recorded.
    assert other.attributes["tallymark.meter.m"] == 2  # type: ignore[attr-defined]
    assert usage.total("m") == 3


@pytest.mark.parametrize("name", ["Bad\ud800", "Bad" * 1000])
def test_an_exception_whose_name_cannot_be_sent_is_counted_without_it(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    class BadError(Exception):
        pass

    BadError.__qualname__ = name

    @track_usage("calls")
    def handler() -> None:
        raise BadError

    with capture_usage() as usage:
        for _ in range(2):
            with pytest.raises(BadError):
                handler()
        with serving(Get()), pytest.raises(BadError):
            handler()
    assert usage.total("calls", account="acme") == 2
    assert usage.total("calls") == 3
    assert all("error.type" not in u.attributes for u in usage)
    assert "attribute 'error.type'" in caplog.text
