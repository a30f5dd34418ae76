"""How much a call is counted by: arguments, durations, bytes, items, and whether it is billed at all."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from itertools import chain, count
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from tallymark import identify, measure, track_usage, tracked
from tallymark.assembly import Runtime
from tallymark.calls import MAX_WAITING
from tallymark.errors import DeclarationError
from tallymark.integrations.serving import Requests, serving
from tallymark.testing import capture_usage, delivery_stats
from tests.sdk.handlers import Get, HTTPError, errors


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The monotonic clock stands still at 0 until it is told to move on, by nanoseconds."""
    now = [0]
    monkeypatch.setattr(tracked, "perf_counter_ns", lambda: now[0])

    def move(nanoseconds: int) -> None:
        now[0] += nanoseconds

    return move


def positional(n: int, /, rest: int = 1) -> None: ...
def plain(n: int = 5, *more: int) -> None: ...
def by_name(*, n: int = 5) -> None: ...
def in_rest(a: int = 0, **rest: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "want"),
    [
        (positional, (3,), {}, 3),
        (positional, (3, 4), {}, 3),
        (plain, (), {}, 5),
        (plain, (7,), {}, 7),
        (plain, (), {"n": 7}, 7),
        (plain, (7, 8, 9), {}, 7),
        (by_name, (), {}, 5),
        (by_name, (), {"n": 2.5}, Decimal("2.5")),
        (in_rest, (1,), {"n": 4}, 4),
    ],
)
def test_an_argument(function: Callable[..., None], args: Any, kwargs: Any, want: object) -> None:
    decorated = track_usage("m", measure.argument("n"))(function)
    also = track_usage("all", measure.of(lambda call: call.arguments.get("n") or call.arguments["rest"]["n"]))(function)
    with capture_usage() as usage:
        decorated(*args, **kwargs)
        also(*args, **kwargs)
    assert usage.total("m") == usage.total("all") == want


def test_arguments_of_methods_and_partials() -> None:
    class Service:
        @track_usage("m", measure.argument("n"))
        def method(self, n: int) -> int:
            return n

        partial = functools.partialmethod(method, 3)

        @classmethod
        @track_usage("m", measure.argument("n"))
        def of_class(cls, n: int) -> int:
            return n

    with capture_usage() as usage:
        assert Service().method(1) == 1
        assert Service().partial() == 3
        assert Service.of_class(5) == 5
        track_usage("p", measure.argument("n"))(functools.partial(plain, 9))()
        track_usage("p", measure.argument("n"))(functools.partial(functools.partial(by_name, n=1), n=10))()
        track_usage("p", measure.of(lambda call: call.arguments["n"]))(functools.partial(plain, n=100))(n=200)
    assert (usage.total("m"), usage.total("p")) == (9, 219)


@pytest.mark.parametrize("name", ["m", "more", "rest"])
def test_an_argument_that_is_not_there_fails_at_declaration(name: str) -> None:
    function = {"m": plain, "more": plain, "rest": in_rest}[name]
    with pytest.raises(DeclarationError, match=f"{function.__name__}: .*{name}"):
        track_usage("m", measure.argument(name))(function)
    with pytest.raises(DeclarationError, match="does not tell"):
        track_usage("m", measure.argument("n"))(min)
    with pytest.raises(DeclarationError, match="name of an argument"):
        measure.argument(3)  # type: ignore[arg-type]


def test_an_argument_counts_as_it_was_given_whatever_the_handler_does_to_it() -> None:
    @track_usage("m", measure.argument("rows", len))
    def insert(rows: list[int]) -> None:
        while rows:
            rows.pop()
        raise HTTPError(500)

    with capture_usage() as usage, pytest.raises(HTTPError):
        insert([1, 2, 3])
    assert usage.total("m") == 3


def test_an_argument_that_cannot_be_counted_is_refused_and_the_handler_runs(caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m", measure.argument("rows", len))
    def insert(rows: Any) -> str:
        return "done"

    with capture_usage() as usage:
        assert insert(7) == "done"
        with pytest.raises(TypeError, match="missing"):
            insert()  # type: ignore[call-arg]
    assert list(usage) == []
    assert usage.refused() == {"m": 1}
    assert "argument 'rows': TypeError" in caplog.text


@given(st.integers(0, 10**15), st.sampled_from([("ns", 0), ("us", 3), ("ms", 6), ("s", 9)]))
def test_durations_are_exact(elapsed: int, unit: tuple[str, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now = [0]
        patch.setattr(tracked, "perf_counter_ns", lambda: now[0])

        @track_usage(f"m.{unit[0]}", measure.duration(unit[0]))
        def handler() -> None:
            now[0] += elapsed

        with capture_usage() as usage:
            handler()
    assert usage.total(f"m.{unit[0]}") * 10 ** unit[1] == elapsed


def test_a_generators_duration_ends_with_it(clock: Callable[[int], None]) -> None:
    @track_usage("m", measure.duration())
    def numbers() -> Iterator[int]:
        clock(1)
        yield 1
        clock(1)

    with capture_usage() as usage:
        items = numbers()
        clock(1000)  # it has not begun
        for _ in items:
            clock(10)
        clock(1000)
    assert usage.total("m") == Decimal("0.000000012")


def test_a_duration_of_a_request_and_a_bad_unit() -> None:
    with pytest.raises(DeclarationError, match="ns, us, ms, s"):
        measure.duration("min")
    requests = Requests[None]("test", None, [track_usage("m", measure.duration("ns"))])
    with capture_usage() as usage:
        requests.begin(Get(), None).end()
    assert usage.total("m") > 0


class Bytes(Get):
    def __init__(self) -> None:
        super().__init__()
        self.request_bytes = 3
        self.response_bytes: int = 0


def test_bytes_are_counted_when_the_answer_is_out_and_once_for_each_meter_and_request() -> None:
    @track_usage("out", measure.response_bytes)
    @track_usage("in", measure.request_bytes)
    def handler() -> None: ...

    @track_usage("out", measure.response_bytes, billable=lambda call: call.status != 201)
    def not_billed() -> None: ...

    @track_usage("out", measure.response_bytes)
    def another() -> None: ...

    with capture_usage() as usage:
        for _ in range(2):
            call = Bytes()
            with serving(call):
                identify(account="acme")
                not_billed()
                handler()
                another()
                handler()
                call.request_bytes += 4
                call.response_bytes += 1000
                assert usage.total("out", account="acme") in (0, 1000)
        assert (usage.total("in"), usage.total("out", account="acme")) == (14, 2000)
        handler()
    assert usage.refused() == {"in": 1, "out": 1}  # outside of a request
    assert usage.not_billed() == {"out": 2}


def test_bytes_that_cannot_wait_are_refused_and_those_of_an_ended_request_counted() -> None:
    @track_usage("out", measure.response_bytes)
    def handler() -> None: ...

    with capture_usage() as usage:
        call = Bytes()
        with serving(call):
            for _ in range(MAX_WAITING + 1):
                handler()
            call.response_bytes = 5
        assert usage.refused() == {"out": 1}
        assert usage.total("out") == 5


def test_items_of_generators_alone() -> None:
    @track_usage("m", measure.items)
    def numbers(n: int) -> Iterator[int]:
        yield from range(n)

    @track_usage("m", measure.items)
    def returned(n: int) -> Any:
        return numbers_bare(n) if n else [1, 2, 3]

    def numbers_bare(n: int) -> Iterator[int]:
        yield from range(n)

    with capture_usage() as usage:
        assert list(numbers(3)) == [0, 1, 2]
        items = numbers(10)
        next(items)
        items.close()  # type: ignore[attr-defined]
        assert errors(usage) == {None: 3, "GeneratorExit": 1}
        assert list(returned(2)) == [0, 1]
        assert usage.total("m") == 6
        returned(0)
    assert usage.refused() == {"m": 1}


def test_several_amounts_with_attributes_of_their_own() -> None:
    @track_usage("m", measure.of(lambda call: [(1, {"kind": "a"}), (2, {"kind": "b"}), (-1, {})]), attributes={"x": 1})
    def handler() -> None: ...

    with capture_usage() as usage:
        handler()
    assert {u.attributes["kind"]: u.quantity for u in usage} == {"a": 1, "b": 2}
    assert {u.attributes["x"] for u in usage} == {1}
    assert usage.refused() == {"m": 1}


KINDS = {"a": 1, "b": 2}


class Pairs:
    """Iterable, and neither a list nor an iterator."""

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        return iter([(n, {"kind": kind}) for kind, n in KINDS.items()])


@pytest.mark.parametrize(
    "several",
    [
        lambda call: ((n, {"kind": kind}) for kind, n in KINDS.items()),
        lambda call: map(dict.popitem, [{n: {"kind": kind}} for kind, n in KINDS.items()]),
        lambda call: zip(KINDS.values(), [{"kind": kind} for kind in KINDS], strict=True),
        lambda call: {(n, HashableKind(kind)) for kind, n in KINDS.items()},
        lambda call: Pairs(),
        lambda call: deque([n, {"kind": kind}] for kind, n in KINDS.items()),
        lambda call: chain([(1, {"kind": "a"})], ((n, {"kind": "b"}) for n in (1, 1))),
    ],
    ids=["generator", "map", "zip", "set", "iterable", "deque", "chain"],
)
def test_several_amounts_of_any_iterable(several: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m", measure.of(several))
    def handler() -> str:
        return "done"

    with capture_usage() as usage:
        assert handler() == "done"
    assert {u.attributes["kind"]: u.quantity for u in usage} == KINDS
    assert (usage.refused(), caplog.messages) == ({}, [])


class HashableKind(dict[str, str]):
    def __init__(self, kind: str) -> None:
        super().__init__(kind=kind)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self["kind"])


class Interrupted(BaseException):
    pass


def _breaking(error: BaseException) -> Iterator[tuple[int, dict[str, str]]]:
    yield 1, {"kind": "a"}
    raise error


@pytest.mark.parametrize(
    ("several", "said"),
    [
        (lambda call: _breaking(KeyError("k")), "KeyError"),
        (lambda call: _breaking(SystemExit()), "SystemExit"),
        (lambda call: _breaking(Interrupted()), "Interrupted"),
        (lambda call: ((1, {}) for _ in count()), "more than 100,000 amounts"),
        (lambda call: [1, 2], r"is a pair \(quantity, attributes\), not a int"),
        (lambda call: (n for n in (1, 2)), r"is a pair \(quantity, attributes\), not a int"),
        (lambda call: [(1, {}, 3)], r"is a pair \(quantity, attributes\), not a tuple"),
        (lambda call: "12", "it is a str, not a number"),
        (lambda call: b"12", "it is a bytes, not a number"),
        (lambda call: {1: {}}, "it is a dict, not a number"),
        (lambda call: object(), "it is a object, not a number"),
    ],
)
def test_amounts_that_cannot_be_taken_are_refused_whole_and_the_handler_runs(
    several: Callable[[Any], Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    @track_usage("m", measure.of(several))
    def handler() -> str:
        return "done"

    with capture_usage() as usage:
        assert handler() == "done"
        with serving(Get()):
            assert handler() == "done"
    assert list(usage) == []
    assert usage.refused() == {"m": 2}
    assert re.search(said, caplog.text)


def test_no_amounts_of_an_iterable_are_none(caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m", measure.of(lambda call: iter(())))
    def handler() -> None: ...

    with capture_usage() as usage:
        handler()
    assert (list(usage), usage.refused(), caplog.messages) == ([], {}, [])


class ArrayOfOne:
    """As a NumPy array without dimensions: it has an `__iter__`, and is a number."""

    def __iter__(self) -> Iterator[int]:
        raise TypeError("iteration over a 0-d array")

    def __index__(self) -> int:
        return 3


class TruthlessAttributes(dict[str, str]):
    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


def test_numbers_and_attributes_of_a_librarys_own() -> None:
    @track_usage("m", measure.of(lambda call: ArrayOfOne()))
    def one() -> None: ...

    @track_usage("m", measure.of(lambda call: [(4, TruthlessAttributes(kind="a")), (5, None)]))
    def several() -> None: ...

    with capture_usage() as usage:
        one()
        several()
    assert {u.attributes.get("kind"): u.quantity for u in usage} == {None: 8, "a": 4}
    assert usage.refused() == {}


async def _asynchronous(call: Any) -> int:
    return 1


async def _async_generator(call: Any) -> AsyncIterator[int]:
    yield 1


def _generator(call: Any) -> Iterator[int]:
    yield 1


class _AsynchronousObject:
    async def __call__(self, call: Any) -> int:
        return 1


@pytest.mark.parametrize("function", [_asynchronous, _async_generator, _generator, _AsynchronousObject(), 7])
def test_functions_that_cannot_answer_at_once_fail_at_declaration(function: Any) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: track_usage("m", billable=function),
        lambda: measure.of(function),
        lambda: measure.tokens(function),
        lambda: measure.argument("n", function),
    ]
    if callable(function):
        attempts += [lambda: track_usage("n", function), lambda: track_usage("m", attributes=function)]
    for attempt in attempts:
        with pytest.raises(DeclarationError, match=r"at once|a function is needed"):
            attempt()


def test_what_is_billable_is_a_predicate_of_the_outcome(fresh: Runtime) -> None:
    @track_usage("m", billable=lambda call: call.status is not None and call.status < 500)
    def handler(outcome: Any) -> None:
        if outcome is not None:
            raise outcome

    @track_usage("kinds", billable=lambda call: call.error_type != "KeyError" and call.arguments["outcome"] != 7)
    def other(outcome: Any) -> None:
        if isinstance(outcome, Exception):
            raise outcome

    def run(outcome: object) -> None:
        for function in (handler, other):
            with contextlib.suppress(HTTPError, KeyError, ValueError), serving(Get()):
                function(outcome)

    with capture_usage() as usage:
        for outcome in (None, HTTPError(404), HTTPError(503), KeyError("x"), ValueError()):
            run(outcome)
        with serving(Get()):
            other(7)
        assert {u.attributes["http.response.status_code"] for u in usage if u.meter == "m"} == {201, 404}
        assert (usage.total("m"), usage.not_billed()) == (2, {"m": 3, "kinds": 2})
        assert delivery_stats()["not_billed"] == 5
        assert delivery_stats()["refused"] == 0


def test_a_billable_function_that_raises_bills_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("m", billable=lambda call: call.result.no_such_thing)
    def handler() -> int:
        return 1

    with capture_usage() as usage:
        assert handler() == 1
    assert (list(usage), usage.refused(), usage.not_billed()) == ([], {"m": 1}, {})
    assert "billable function raised" in caplog.text


def test_a_stream_that_its_client_left_need_not_be_billed() -> None:
    @track_usage("m", billable=lambda call: call.error is None or call.items >= 2)
    def numbers() -> Iterator[int]:
        yield from range(5)

    with capture_usage() as usage:
        for taken in (1, 2, 9):
            items = numbers()
            for _ in range(taken):
                next(items, None)
            items.close()  # type: ignore[attr-defined]
    assert errors(usage) == {None: 1, "GeneratorExit": 1}
    assert usage.not_billed() == {"m": 1}


def test_a_call_that_is_not_billed_leaves_no_evidence() -> None:
    @track_usage("m", billable=lambda call: call.result)
    def handler(billed: bool) -> bool:
        return billed

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with capture_usage(), tracer.start_as_current_span("request") as span:
        handler(False)
        assert not dict(span.attributes or {})  # type: ignore[attr-defined]
        handler(True)
        assert span.attributes["tallymark.meter.m"] == 1  # type: ignore[attr-defined]


def test_a_hostile_status_hides_no_exception_of_the_handler() -> None:
    class HostileError(Exception):
        @property
        def status_code(self) -> int:
            raise SystemExit

    @track_usage("m")
    @track_usage("n", measure.of(lambda call: 1))
    def handler() -> None:
        raise error

    error = HostileError()
    with capture_usage() as usage, pytest.raises(HostileError) as caught, serving(Get()):
        handler()
    assert caught.value is error
    assert usage.total("m") == usage.total("n") == 1


def test_mocks_as_results() -> None:
    @track_usage("m", measure.tokens())
    def handler() -> Any:
        return MagicMock()

    with capture_usage() as usage:
        handler()
    assert usage.refused() == {"m": 1}
