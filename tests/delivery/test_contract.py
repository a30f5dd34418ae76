"""Collectors and their database are broken in every way that we know: sent equals stored, to the unit, in every run.

These are few: CI adds hundreds by `make contract`, which makes as many as it is told. TALLYMARK_TEST_CONTRACT and
TALLYMARK_TEST_SEED say how many here, and which.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.delivery.contract.faults import SLOW
from tests.delivery.contract.items import Item, request
from tests.delivery.contract.link import SOCKET, Link
from tests.delivery.contract.load import Gateway
from tests.delivery.contract.reckoning import Reckoning
from tests.delivery.contract.runs import KINDS, Result, World, planned, play, worlds
from tests.delivery.contract.table import failures
from tests.support.failures import tail

RUNS = int(os.environ.get("TALLYMARK_TEST_CONTRACT", "30"))
SEED = int(os.environ.get("TALLYMARK_TEST_SEED", "0")) or random.SystemRandom().randrange(10**8)
BATCH = 15

results: list[Result] = []


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    # Not below pytest's folder: the server's user may not enter that, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="tallymark-contract-") as folder, worlds(Path(folder)) as found:
        yield found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, RUNS, BATCH))
def test_what_was_sent_is_stored_once(world: World, first: int) -> None:
    found = [play(world, SEED + number) for number in range(first, min(first + BATCH, RUNS))]
    results.extend(found)
    assert not any(result.problems for result in found), "\n".join(failures(found))


def test_every_kind_is_in_turn() -> None:
    possible = list(KINDS)
    assert all(kind in planned(seed, possible) for seed, kind in enumerate(possible))
    assert planned(7, possible) == planned(7, possible)
    assert not SLOW - set(KINDS)


def test_the_load_is_what_it_says() -> None:
    """The gateway's tally, made again from what would be on the wire: increases of running totals, levels, totals."""
    gateway = Gateway(3, "run")
    spans = []
    for _ in range(40):
        gateway.use()
        spans += [s for r in gateway.calls_behind().resource_spans for sc in r.scope_spans for s in sc.spans]
    gateway.end()
    gateway.rng.shuffle(gateway.waiting)
    wire = OnTheWire(gateway.waiting)
    assert wire.used() == gateway.tally.used
    assert {meter for _, meter in wire.used()} == {"whole", "tenths"} | {
        f"foreign.{name}" for name in ("requests", "seconds", "egress")
    }
    assert wire.levels == gateway.tally.levels
    assert {meter for _, meter, *_ in wire.levels} == {"queue", "seats", "foreign.connections"}
    assert wire.told() == gateway.tally.told
    assert wire.shown == gateway.tally.calls
    assert Counter(span.attributes[0].value.string_value for span in spans) == gateway.tally.calls
    assert gateway.tally.calls.total() == len({(span.trace_id, span.span_id) for span in spans})


class OnTheWire:
    """What a request says, read by other means than the load's."""

    def __init__(self, items: list[Item]) -> None:
        self.seen: dict[tuple[Any, ...], dict[tuple[int, int], Fraction]] = {}
        """A stream's points by their times; account, meter and temporality are first in its key."""
        self.levels: Counter[tuple[str, str, int, Decimal]] = Counter()
        self.totals: dict[tuple[Any, ...], dict[int, Fraction]] = {}
        self.shown: Counter[str] = Counter()
        self.closed: set[tuple[str, int]] = set()
        for resource in request(items).resource_metrics:
            producer = resource.resource.attributes[1].value.string_value
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self._metric(producer, scope.scope.name, metric)

    def _metric(self, producer: str, scope: str, metric: Any) -> None:
        kind = metric.WhichOneof("data")
        data = getattr(metric, kind)
        for point in data.data_points:
            said = {one.key: one.value for one in point.attributes}
            times = (point.start_time_unix_nano, point.time_unix_nano)
            if scope == "tallymark.control":
                self._control(producer, metric.name, point, said, times)
                continue
            account = said.get("tallymark.account.id", said.get("consumer.id")).string_value  # type: ignore[union-attr]
            if kind == "gauge" or (kind == "sum" and not data.is_monotonic):
                value = Decimal(point.as_int) if point.HasField("as_int") else Decimal(repr(point.as_double))
                meter = {"gateway.connections": "foreign.connections"}.get(metric.name, metric.name)
                self.levels[account, meter, times[1] // 1000, value] += 1
                continue
            if kind == "histogram":
                told = {"foreign.requests": Fraction(point.count), "foreign.seconds": Fraction(repr(point.sum))}
            elif metric.name == "gateway.bytes.sent":
                told = {"foreign.egress": Fraction(point.as_int, 1000)}
            else:
                told = {metric.name: _number(point)}
            for meter, quantity in told.items():
                key = (account, meter, data.aggregation_temporality, producer, scope, str(point.attributes))
                points = self.seen.setdefault(key, {})
                assert times not in points, "every point has an identity of its own"
                points[times] = quantity

    def _control(self, producer: str, name: str, point: Any, said: dict[str, Any], times: tuple[int, int]) -> None:
        if name == "tallymark.control.closed":
            self.closed.add((producer, times[0]))
        elif name == "tallymark.control.evidence":
            self.shown[said["tallymark.control.account"].string_value] += point.as_int
        else:
            part = said["tallymark.control.part"].int_value if "tallymark.control.part" in said else 0
            key = (producer, said["tallymark.control.meter"].string_value, *times)
            assert part not in self.totals.setdefault(key, {})
            self.totals[key][part] = _number(point)

    def used(self) -> dict[tuple[str, str], Fraction]:
        """(account, meter) to the sum of the increases."""
        totals: dict[tuple[str, str], Fraction] = {}
        for (account, meter, temporality, *_), points in self.seen.items():
            last = {start: value for (start, _), value in sorted(points.items())}
            amount = sum(points.values() if temporality == 1 else last.values(), Fraction(0))
            totals[account, meter] = totals.get((account, meter), Fraction(0)) + amount
        return totals

    def told(self) -> dict[tuple[str, str], Fraction]:
        """(producer, meter) to the sum of the last totals of its runs, all of which have ended."""
        last: dict[tuple[str, str, int], Fraction] = {}
        for (producer, meter, start, _), parts in sorted(self.totals.items()):
            assert (producer, start) in self.closed
            last[producer, meter, start] = sum(parts.values(), Fraction(0))
        found: dict[tuple[str, str], Fraction] = {}
        for (producer, meter, _), total in last.items():
            found[producer, meter] = found.get((producer, meter), Fraction(0)) + total
        return found


def _number(point: Any) -> Fraction:
    return Fraction(point.as_int) if point.HasField("as_int") else Fraction(repr(point.as_double))


def test_the_reckoning_sees_a_single_unit() -> None:
    reckoning = Reckoning()
    reckoning.equal("points", {"a": Decimal(1), "b": Decimal("2.0")}, {"a": Decimal(1), "b": 2})
    assert (reckoning.lost, reckoning.doubled, reckoning.problems) == (0, 0, [])
    reckoning.equal("points", {"a": Decimal(2), "b": Decimal(1), "c": 1}, {"a": Decimal(1), "b": Decimal(2), "d": 1})
    assert (reckoning.lost, reckoning.doubled, len(reckoning.problems)) == (2, 2, 4)


def test_a_link_that_falls_silent_is_noticed_by_its_client_alone(tmp_path: Path) -> None:
    """Whatever becomes of the client: the server's side stays open until it is buried."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        link = Link(tmp_path / "link", tmp_path / "server")
        try:
            with through(link) as client:
                there, _ = server.accept()
                client.sendall(b"a")
                assert there.recv(1) == b"a"
                link.fall_silent()
                assert ended(client)
            there.setblocking(False)
            with pytest.raises(BlockingIOError):
                there.recv(1)
            with through(link) as other:
                again, _ = server.accept()
                other.sendall(b"c")
                assert again.recv(1) == b"c"
                again.close()
            link.bury()
            there.settimeout(60)
            assert ended(there)
            there.close()
        finally:
            link.close()


def ended(connection: socket.socket) -> bool:
    """Waits for the other side's end; raises TimeoutError."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def through(link: Link) -> socket.socket:
    """A connection by way of the link."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(link.folder / SOCKET))
    return client


def test_a_failed_run_is_told_whole(tmp_path: Path) -> None:
    """Which, why at some length, how to repeat it, and what the collectors wrote last."""
    log = tmp_path / "collector0.log"
    log.write_text("".join(f"line {n}\n" for n in range(1000)))
    good = Result(seed=6, kinds=("disk slow",))
    bad = Result(seed=7, kinds=("disk full",), problems=["first", "x" * 5000], logs={log.name: tail(log), "none": []})
    lines = failures([good, bad])
    assert not any("seed 6" in line for line in lines)
    assert lines[1:3] == ["FAILED: seed 7 (disk full)", "  first"]
    assert "  again: make contract RUNS=1 SEED=7" in lines
    assert [line.strip() for line in lines if line.startswith("    line")] == [f"line {n}" for n in range(980, 1000)]
    assert "  none has written nothing" in lines
    assert 2_000 < sum(map(len, lines)) < 3_000
    assert tail(tmp_path / "not there") == []
