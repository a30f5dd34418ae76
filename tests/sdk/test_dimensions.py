import math
from collections.abc import Callable
from decimal import Decimal
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tallymark
from tallymark import dimensions, record, track_usage
from tallymark.assembly import Runtime
from tallymark.dimensions import Value, from_mapping, joined, of_call
from tallymark.errors import DeclarationError
from tallymark.integrations.serving import serving
from tallymark.settings import Settings
from tallymark.testing import capture_usage
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.handlers import HTTP, Get

BAD = [
    {"tallymark.account.id": "other"},
    {"otel.metric.overflow": True},
    {"": 1},
    {1: 1},
    {"a": 2**63},
    {"a": math.nan},
    {"a": math.inf},
    {"a": "\ud800"},
    {"a": "nul\0"},
    {"\udfff": 1},
    {"a": "x" * 1025},
    {"a": [1]},
    {"a": object()},
    {"a" * 256: 1},
    {f"a{n}": n for n in range(17)},
]


@pytest.mark.parametrize("attributes", BAD)
def test_bad_attributes_fail_where_they_are_declared(attributes: dict[str, object]) -> None:
    with capture_usage(), pytest.raises(DeclarationError, match="attribute"):
        track_usage("m", attributes=attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize("attributes", BAD)
def test_bad_attributes_at_call_time_cost_no_usage(attributes: dict[str, object]) -> None:
    with capture_usage() as usage:
        record("m", 5, attributes={"good": "yes", **attributes})  # type: ignore[arg-type]
    (only,) = usage
    assert only.quantity == 5
    assert only.attributes["good"] == "yes"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("not even this")

    __str__ = __repr__


def test_what_cannot_be_printed_can_be_refused(caplog: pytest.LogCaptureFixture) -> None:
    with capture_usage() as usage:
        record("m", 1, attributes={"a": Unprintable()})  # type: ignore[dict-item]
        record("m", Unprintable())  # type: ignore[arg-type]
        record(Unprintable())  # type: ignore[arg-type]
    assert usage.total("m") == 1
    assert "Unprintable" in caplog.text


def test_equal_values_of_other_types_are_other_streams() -> None:
    with capture_usage() as usage:
        for value in (1, 1.0, True, "1"):
            record("m", 1, attributes={"a": value})
        record("m", 1, attributes={"a": 0.0})
        record("m", 1, attributes={"a": -0.0})
    assert sorted(str(u.attributes["a"]) for u in usage) == ["0.0", "1", "1", "1.0", "True"]


def test_order_of_attributes_makes_no_stream() -> None:
    with capture_usage() as usage:
        record("m", 1, attributes={"a": 1, "b": 2})
        record("m", 1, attributes={"b": 2, "a": 1})
    assert [u.quantity for u in usage] == [2]


def test_handlers_that_say_the_same_of_a_request_in_other_ways_are_one_point(
    fresh: Runtime, collector: FakeCollector, settings: Callable[..., Settings]
) -> None:
    fresh.configure(settings(collector.endpoint, interval_s=86_400.0))

    @track_usage("calls")
    def told_by_the_call() -> None: ...

    @track_usage("calls", attributes={"http.route": HTTP["http.route"]})
    def tells_its_route() -> None: ...

    @track_usage("calls", attributes=lambda result: {"http.route": HTTP["http.route"]})
    def tells_it_late() -> None: ...

    with serving(Get()):
        for handler, times in ((told_by_the_call, 2), (tells_its_route, 5), (tells_it_late, 1)):
            for _ in range(times):
                handler()
        record("inside", 3)
        record("inside", 4, attributes={"http.request.method": "GET"})
    assert tallymark.flush(60)
    assert sorted((key[1], value) for key, value in collector.points().items()) == [
        ("calls", Decimal(8)),
        ("inside", Decimal(7)),
    ]


VALUES = st.one_of(st.text("ab/{}", max_size=4), st.booleans(), st.integers(-9, 9), st.floats(-9, 9))
SAID = st.dictionaries(st.sampled_from([*HTTP, "http.response.status_code", "error.type", "a", "z"]), VALUES)


@given(st.data(), SAID, SAID)
def test_one_set_of_attributes_is_one_key_whatever_says_which_in_what_order(
    data: st.DataObject, said: dict[str, Value], meant: dict[str, Value]
) -> None:
    both = {**said, **meant}
    key, _ = from_mapping(both)
    own, _ = from_mapping(meant)
    shuffled = dict(data.draw(st.permutations(list(said.items()))))
    assert of_call(shuffled, own) == (key, [])
    assert joined(of_call(shuffled)[0], own) == key
    assert of_call(dict(data.draw(st.permutations(list(both.items()))))) == (key, [])


def test_none_is_left_out() -> None:
    assert from_mapping({"a": None, "b": "x"}) == ((("b", "string", "x"),), [])


def test_a_meter_may_name_its_own_route() -> None:
    own, _ = from_mapping({"http.route": "/mine"})
    assert dimensions.of_call({"http.request.method": "GET", "http.route": "/framework", "error.type": None}, own) == (
        (("http.request.method", "string", "GET"), ("http.route", "string", "/mine")),
        [],
    )


class Rule:
    """As frameworks have them for routes."""

    def __str__(self) -> str:
        return "/rule"


class RuleText(str):
    pass


UNSENDABLE = [
    Rule(),
    b"/bytes",
    ["/list"],
    "/surrogate\ud800",
    "/nul\0",
    "/long" * 1000,
    2**63,
    float("nan"),
]


@pytest.mark.parametrize("value", UNSENDABLE, ids=lambda value: str(type(value).__name__))
def test_what_a_call_says_of_itself_is_checked_like_what_its_meter_says(value: Any) -> None:
    found, (problem,) = dimensions.of_call({"http.request.method": "GET", "http.route": value})
    assert found == (("http.request.method", "string", "GET"),)
    assert "http.route" in problem


def test_what_a_call_says_of_itself_has_the_types_of_the_wire() -> None:
    said = {"a": HTTPStatus.OK, "b": RuleText("/x"), "c": True, "tallymark.task.name": "t"}
    found, problems = dimensions.of_call(said)
    assert found == (
        ("a", "int", 200),
        ("b", "string", "/x"),
        ("c", "bool", True),
        ("tallymark.task.name", "string", "t"),
    )
    assert [type(value) for _, _, value in found] == [int, str, bool, str]
    assert problems == []


class Routed(Get):
    found: Any = None

    def route(self) -> Any:
        return self.found


@pytest.mark.parametrize("value", UNSENDABLE, ids=lambda value: str(type(value).__name__))
def test_a_route_that_cannot_be_sent_costs_itself_alone(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("calls", attributes={"own": 1})
    def handler() -> None:
        record("m", 2, attributes={"own": 1})

    call = Routed()
    call.found = value
    with capture_usage() as usage, serving(call):
        for _ in range(2):
            handler()
    found = {u.meter: (u.quantity, u.attributes) for u in usage}
    method = {"http.request.method": "GET", "own": 1}
    assert found == {"calls": (2, {**method, "http.response.status_code": 201}), "m": (4, method)}
    assert usage.refused() == {}
    assert {line.split(":")[0] for line in caplog.messages} == {
        f"usage of meter {meter} is recorded without an attribute" for meter in ("calls", "m")
    }
    assert "http.route" in caplog.text


def test_a_route_that_becomes_sendable_is_sent() -> None:
    @track_usage("calls")
    def handler() -> None: ...

    call = Routed()
    with capture_usage() as usage, serving(call):
        for call.found in (["/list"], "/one", b"/bytes", "/one"):
            handler()
    assert {u.attributes.get("http.route"): u.quantity for u in usage} == {None: 2, "/one": 2}
