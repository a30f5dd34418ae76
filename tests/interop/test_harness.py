"""The harness itself: it sees a single unit, and says what it did not try."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from tests.interop import build, clients
from tests.interop.audited import overlapping
from tests.interop.fates import Fate, Scripted, Seeded
from tests.interop.ledger import Ledger
from tests.interop.plans import rounds
from tests.interop.stored import difference
from tests.support.usage import BASE, SECOND, number, request, sum_metric

NAMED = {"tallymark.account.id": "acme", "http.route": "/"}
ENTRY = ("api.requests", "acme", "/")


def body(*points: tuple[int, int, float], temporality: int = 1, producer: str = "one") -> bytes:
    found = [number(BASE + start * SECOND, BASE + end * SECOND, value, NAMED) for start, end, value in points]
    return request(sum_metric(found, temporality=temporality), producer=producer).SerializeToString()


def test_what_comes_again_counts_once() -> None:
    ledger = Ledger()
    for sent in (body((0, 1, 3)), body((1, 2, 0.1)), body((0, 1, 3)), body((0, 1, 3), producer="two")):
        ledger.take("metrics", sent)
    assert ledger.quantities() == {ENTRY: Decimal("6.1")}
    assert ledger.seen == {"integer": 3, "double": 1, "again": 1}


def test_two_values_of_one_point_are_a_fault_of_the_client() -> None:
    ledger = Ledger()
    ledger.take("metrics", body((0, 1, 3)))
    with pytest.raises(AssertionError, match="two values"):
        ledger.take("metrics", body((0, 1, 4)))


def test_cumulative_sums_count_by_their_last_total_in_each_epoch() -> None:
    ledger = Ledger()
    for point in ((0, 1, 3), (0, 3, 9), (0, 2, 5), (10, 11, 2)):
        ledger.take("metrics", body(point, temporality=2))
    assert ledger.quantities() == {ENTRY: Decimal(11)}


def test_overlaps_are_counted_by_our_own_means() -> None:
    assert overlapping([[(0, 10_000), (10_000, 20_000)], [(0, 5_000)]]) == {}
    assert overlapping([[(0, 10_000), (9_000, 20_000), (11_000, 12_000)]]) == {(9, 20): 1, (11, 12): 1}
    ledger = Ledger()
    for sent in (body((0, 2, 3)), body((1, 3, 1)), body((3, 4, 1)), body((1, 2, 1), producer="two")):
        ledger.take("metrics", sent)
    second = 1_000_000
    begin = BASE // 1000
    assert overlapping(ledger.intervals().values()) == {(begin + second, begin + 3 * second): 1}


def test_a_single_unit_is_a_difference() -> None:
    some = {ENTRY: Decimal(3)}
    assert difference(some, {ENTRY: Decimal("3.0")}) == {}
    assert difference(some, {ENTRY: Decimal("3.001")}) == {"api.requests acme /": ("3", "3.001")}
    assert difference(some, {}) == {"api.requests acme /": ("3", "0")}


def test_fates_repeat_and_no_request_fails_for_ever() -> None:
    chances = {Fate.REFUSED: 0.5, Fate.LOST: 0.4}
    one, other = Seeded(3, chances), Seeded(3, chances)
    fates = [one.of("metrics", b"same") for _ in range(50)]
    assert fates == [other.of("metrics", b"same") for _ in range(50)]
    assert sum(fate is not Fate.PASSED for fate in fates) == 2
    script = Scripted(Fate.CUT)
    met = [script.of(signal, b"") for signal in ("traces", "metrics", "metrics")]
    assert met == [Fate.PASSED, Fate.CUT, Fate.PASSED]


@pytest.mark.parametrize("seed", range(5))
def test_totals_of_doubles_are_the_decimals_that_are_meant(seed: int) -> None:
    doubles: dict[tuple[str, str], float] = {}
    for call in (call for each in rounds(seed, "a", 6) for call in each):
        key = call["account"], call["route"]
        doubles[key] = doubles.get(key, 0.0) + call["volume_thousandths"] / 1000
        assert len(repr(doubles[key]).partition(".")[2]) <= 3


@pytest.mark.parametrize("name", build.BUILDERS)
def test_a_missing_tool_is_a_reason_not_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(clients.SWITCH, "1")
    with pytest.raises(clients.NotBuiltError, match="make interop"):
        clients.command(name)
    assert build.build(name).startswith("NOT BUILT: there is no ")
    with pytest.raises(clients.NotBuiltError, match="there is no "):
        clients.command(name)


def test_versions_are_pinned_and_no_registry_is_named() -> None:
    here = Path(build.__file__).parent
    wanted = json.loads((here / "javascript" / "package.json").read_text())["dependencies"]
    assert all(version[0].isdigit() for version in wanted.values())
    lock = json.loads((here / "javascript" / "package-lock.json").read_text())["packages"]
    assert {name: lock[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert not [path for path, entry in lock.items() if "resolved" in entry]
