"""The parts of a process, in the test's own one: it can die at any call, and an heir finds what it left."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource

from tallymark.batches import producer_record
from tallymark.folder import folders_in
from tallymark.journal import Journal
from tallymark.merging import Merger
from tallymark.meters import Meter
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.quantities import exact
from tallymark.recorder import Recorder
from tallymark.recovery import Recovery
from tallymark.reporting import Reporter
from tallymark.streams import Series
from tests.sdk.fake_collector import FakeCollector

SERIES = Series(Meter("m", "1"), ())
SECOND = 10**9
NOW = 1_000_000 * SECOND


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is run."""


class Process:
    """The parts of one process on the disk; `die` lets go of the lock as the kernel does."""

    def __init__(self, place: Path, name: str = "i", now: int = NOW, max_bytes: int = 2**20) -> None:
        self.place = place
        self.now = now
        reporter = Reporter(every_s=0)
        self.outbox = Outbox(max_bytes)
        self.packer = Packer(self.outbox, reporter)
        self.journal = Journal(self.outbox, self.packer, reporter, lambda: self.now)
        self.merger = Merger(self.outbox, reporter)
        self.recovery = Recovery(self.outbox, self.packer, self.merger, reporter, lambda: self.now)
        self.recorder = Recorder(now, self.journal.new_segment)
        self.producer = producer_record(Resource({"service.instance.id": name}), "tallymark", "1")
        self.journal.open(place, self.producer, 10 * SECOND, self.recorder)

    def add(self, quantity: Any, account: str = "acme") -> None:
        self.recorder.add((SERIES, account, None), exact(quantity))

    def cut(self) -> None:
        self.now += SECOND
        self.journal.cut(self.recorder)

    def recover(self) -> None:
        self.recovery.run(self.place, self.journal.where())

    def deliver(self, collector: Stored) -> None:
        while (batch := self.outbox.head()) is not None:
            batch.parcel.note_attempt()
            collector.stored.append(batch.read())
            self.outbox.acknowledge(batch)

    def die(self) -> None:
        if self.journal._folder is not None:
            self.journal._folder.release()
        self.recovery.close_inherited()


class Stored(FakeCollector):
    """The fake collector's reckoning alone, without a server."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []


def heir(place: Path, collector: Stored, now: int = NOW + 60 * SECOND) -> Process:
    """A process that finds what is there and delivers it."""
    process = Process(place, "heir", now)
    process.recover()
    process.deliver(collector)
    assert folders_in(place) == [], "nothing is left where everything is delivered"
    return process


def at_step(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool) -> None:
    """Kills the process before or after it calls `owner.name`, once."""
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        if after:
            with contextlib.suppress(OSError):
                real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, dying)
