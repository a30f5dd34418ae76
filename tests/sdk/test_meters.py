from concurrent.futures import ThreadPoolExecutor

import pytest

from tallymark import track_usage
from tallymark.assembly import Runtime
from tallymark.errors import DeclarationError, TallymarkError
from tallymark.meters import Meter, Meters


@pytest.mark.parametrize("name", ["a", "api.requests", "Images-v2/large_1", "a" * 255])
def test_names_of_instruments_are_taken(name: str) -> None:
    assert Meter(name, "1").name == name


@pytest.mark.parametrize("name", ["", "1a", ".a", "a b", "a" * 256, "é", "a\n", "a:b", None, 7])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(DeclarationError, match="meter name"):
        Meter(name, "1")  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["", "x" * 64, "µs", "a\nb", None, 1])
def test_bad_units_are_refused(unit: object) -> None:
    with pytest.raises(DeclarationError, match="unit"):
        Meter("m", unit)  # type: ignore[arg-type]


def test_a_bad_meter_fails_where_it_is_declared(fresh: Runtime) -> None:
    with pytest.raises(TallymarkError):
        track_usage("no spaces")
    with pytest.raises(ValueError, match="UCUM"):
        track_usage("m", unit="x" * 64)


def test_one_meter_has_one_unit(fresh: Runtime) -> None:
    track_usage("tokens", unit="{token}")
    track_usage("tokens", unit="{token}")
    with pytest.raises(DeclarationError, match=r"\{token\}.*By"):
        track_usage("tokens", unit="By")


def test_one_object_for_each_meter_whoever_asks_first() -> None:
    meters = Meters()
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: meters.declare("m", "1"), range(200)))
        undeclared = set(pool.map(lambda _: meters.at_call("n", None), range(200)))
    assert len(found) == len(undeclared) == 1
    assert meters.at_call("m", None) in found


def test_a_recording_takes_the_declared_unit_and_keeps_another_one() -> None:
    meters = Meters()
    declared = meters.declare("tokens", "{token}")
    assert meters.at_call("tokens", None) is declared
    assert meters.at_call("tokens", "{token}") is declared
    assert meters.at_call("tokens", "By").unit == "By"
    assert meters.at_call("other", None).unit == "1"


def test_a_meter_recorded_before_its_declaration_is_the_declared_one() -> None:
    """Two objects would be two sums, and on the wire two points of one stream and interval."""
    meters = Meters()
    early = meters.at_call("jobs", None)
    assert meters.declare("jobs", "1") is early
    assert meters.at_call("jobs", "1") is early
    assert meters.at_call("jobs", None) is early
