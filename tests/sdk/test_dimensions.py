import math

import pytest

from tallymark import dimensions, record, track_usage
from tallymark.dimensions import from_mapping
from tallymark.errors import DeclarationError
from tallymark.testing import capture_usage

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


def test_none_is_left_out() -> None:
    assert from_mapping({"a": None, "b": "x"}) == ((("b", "string", "x"),), [])


def test_a_meter_may_name_its_own_route() -> None:
    own, _ = from_mapping({"http.route": "/mine"})
    assert dimensions.of_call({"http.request.method": "GET", "http.route": "/framework", "error.type": None}, own) == (
        ("http.request.method", "string", "GET"),
        ("http.route", "string", "/mine"),
    )
