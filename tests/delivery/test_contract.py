"""Collectors and their database are broken in every way that we know: sent equals stored, to the unit, in every run.

These are few: CI adds hundreds by `make contract`, which makes as many as it is told. TALLYMARK_TEST_CONTRACT and
TALLYMARK_TEST_SEED say how many here, and which.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from tests.delivery.contract.load import Gateway, request
from tests.delivery.contract.runs import KINDS, Result, World, planned, play, worlds

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
    wrong = [str(result) for result in found if result.problems]
    assert not wrong, "\n".join(wrong)


def test_every_kind_is_in_turn() -> None:
    possible = list(KINDS)
    assert all(kind in planned(seed, possible) for seed, kind in enumerate(possible))
    assert planned(7, possible) == planned(7, possible)


def test_the_load_is_what_it_says() -> None:
    """The gateway's tally, made again from what would be on the wire: increases of running totals."""
    gateway = Gateway(3, "run")
    for _ in range(40):
        gateway.use()
    gateway.rng.shuffle(gateway.waiting)
    seen: dict[tuple[object, ...], dict[tuple[int, int], Decimal]] = {}
    for resource in request(gateway.waiting).resource_metrics:
        for metric in resource.scope_metrics[0].metrics:
            for point in metric.sum.data_points:
                account = point.attributes[0].value.string_value
                value = Decimal(point.as_int) if point.HasField("as_int") else Decimal(repr(point.as_double))
                key = (account, metric.name, metric.sum.aggregation_temporality, str(resource), str(point.attributes))
                times = (point.start_time_unix_nano, point.time_unix_nano)
                assert times not in seen.setdefault(key, {}), "every point has an identity of its own"
                seen[key][times] = value
    totals: dict[tuple[object, object], Decimal] = {}
    for (account, meter, temporality, *_), points in seen.items():
        last = {start: value for (start, _), value in sorted(points.items())}
        amount = sum(points.values() if temporality == 1 else last.values(), Decimal(0))
        totals[account, meter] = totals.get((account, meter), Decimal(0)) + amount
    assert totals == gateway.recorded()
