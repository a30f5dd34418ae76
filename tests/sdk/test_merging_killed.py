"""Merging: each step at which a process may die or its disk may fail."""

from __future__ import annotations

import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tallymark import parcels
from tallymark.merging import MAX_TOGETHER
from tallymark.outbox import Outbox
from tallymark.sums import Sums
from tests.sdk.dying_process import NOW, SECOND, Killed, Process, Stored, at_step, heir
from tests.sdk.full_outbox import check_intervals, cuts, files


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


STEPS: list[tuple[Any, str]] = [
    (Outbox, "claim"),
    (Sums, "take"),
    (parcels, "write"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "unlink"),
    (parcels, "synchronise"),
    (parcels, "read"),
    (Outbox, "exchange"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_killed_at_each_step_of_merging(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, times: int
) -> None:
    """The n-th time that each step comes."""
    process = Process(place)
    cuts(process, 2 * MAX_TOGETHER + 2)
    process.add(5)
    calls = 0
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            at_step(monkeypatch, owner, name, after=after)
            return getattr(owner, name)(*args, **kwargs)
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying)
        with pytest.raises(Killed):
            process.merger.make_room(0)
    monkeypatch.undo()
    process.die()
    heir(place, collector)
    assert collector.totals() == {"m": Decimal("0.3") * 18 + 5}
    check_intervals(collector)


def test_killed_in_the_midst_of_completing(place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(place)
    cuts(process, MAX_TOGETHER)
    at_step(monkeypatch, Path, "unlink", after=False)
    with pytest.raises(Killed):
        process.merger.make_room(0)
    process.die()
    assert len(files(place)) == MAX_TOGETHER
    for n in range(4):
        again = Process(place, f"heir-{n}", NOW + 60 * SECOND)
        at_step(monkeypatch, Path, "unlink", after=True)
        with pytest.raises(Killed):
            again.recover()
        monkeypatch.undo()
        again.die()
    heir(place, collector)
    assert collector.totals() == {"m": Decimal("0.3") * MAX_TOGETHER}


@pytest.mark.parametrize("step", ["unlink", "rename", "synchronise"])
def test_a_disk_that_fails_costs_nothing(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process = Process(place)
    cuts(process, MAX_TOGETHER)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(parcels if step == "synchronise" else Path, step, failing)
        process.merger.make_room(0)
        assert process.outbox.is_due() == (step == "rename"), "what is being merged is not sent"
    process.merger.make_room(0)
    process.deliver(collector)
    assert files(place) == []
    assert collector.totals() == {"m": Decimal("0.3") * MAX_TOGETHER}
