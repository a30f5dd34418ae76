"""Delivery: what was recorded arrives once, whatever the collector does, and `flush` tells the truth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.resources import Resource

from tallymark import configure, flush, identify, record, shutdown
from tallymark.assembly import Runtime
from tallymark.batches import producer_record
from tallymark.dead_letters import DeadLetters
from tallymark.delivery import Delivery
from tallymark.errors import SettingsError
from tallymark.exporting import UsageExporter
from tallymark.journal import Journal
from tallymark.merging import Merger
from tallymark.meters import Meter
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.quantities import EXACT
from tallymark.recorder import Recorder
from tallymark.recovery import Recovery
from tallymark.reporting import Reporter
from tallymark.resource import make_resource, of_forked_child
from tallymark.sending import Answer, Verdict
from tallymark.streams import Series

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class ScriptedClient:
    """Answers each export by `answer`, which may raise; keeps what it was given."""

    def __init__(self, answer: Callable[[bytes], bool]) -> None:
        self.answer = answer
        self.tried: list[bytes] = []
        self.delivered: list[bytes] = []

    def send(self, body: bytes) -> Answer:
        self.tried.append(body)
        if self.answer(body):
            self.delivered.append(body)
            return Answer(Verdict.ACKNOWLEDGED)
        return Answer(Verdict.NOT_NOW, "as the test wants it")

    def close(self) -> None:
        pass


class Parts:
    """What a runtime makes, without a runtime; on the disk where a place is given."""

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        interval_s: float = 0.02,
        max_bytes: int = 2**20,
        place: Path | None = None,
    ) -> None:
        reporter = Reporter()
        self.outbox = Outbox(max_bytes)
        packer = Packer(self.outbox, reporter)
        self.journal = Journal(self.outbox, packer, reporter)
        self.recorder = Recorder(time.time_ns(), self.journal.new_segment)
        self.letters = DeadLetters(reporter)
        self.letters.place = place
        self.journal.open(place, PRODUCER, int(interval_s * 1e9), self.recorder)
        self.exporter = UsageExporter(
            self.recorder,
            self.outbox,
            self.journal,
            Recovery(self.outbox, packer, merger := Merger(self.outbox, reporter), reporter),
            merger,
            Delivery(self.outbox, self.letters, reporter, connect),
            place=place,
            interval_s=interval_s,
            reporter=reporter,
        )

    def add(self, account: str, quantity: int = 1) -> None:
        self.recorder.add((SERIES, account, None), quantity)


SERIES = Series(Meter("m", "1"), ())
PRODUCER = producer_record(Resource({"service.instance.id": "i"}), "tallymark", "0")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ten_thousand_accounts_arrive_as_ten_thousand(fresh: Runtime, collector: Any, settings: Any) -> None:
    want = {}
    for n in range(10_000):
        with identify(account=f"account-{n}", plan="pro"):
            record("calls", n + 1, unit="{call}")
            record("weight", 0.1)
        want[f"account-{n}"] = n + 1
    fresh.configure(settings(collector.endpoint, timeout_s=5))
    assert flush(60)
    got = {}
    for (_, meter, unit, attributes, _, _), value in collector.points().items():
        if meter == "calls":
            assert unit == "{call}"
            account = dict(attributes)["tallymark.account.id"][2:].decode()
            got[account] = got.get(account, 0) + value
    assert got == want
    assert collector.totals()["weight"] == 1000
    assert not [key for key in collector.points() if b"overflow" in repr(key).encode()]


def test_fractions_arrive_exactly(fresh: Runtime, collector: Any, settings: Any) -> None:
    identify(account="acme")
    total = Decimal(0)
    for n in range(1, 200):
        amount = Decimal(n) / Decimal(2**20) + Decimal("0.000000000000000000000001")
        record("gb", amount)
        total = EXACT.add(total, amount)
    fresh.configure(settings(collector.endpoint))
    assert flush(60)
    assert collector.totals() == {"gb": total}


def test_a_collector_that_fails_at_first_loses_nothing(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    collector = start_collector(answer=lambda n: UNAVAILABLE if n < 3 else None)
    fresh.configure(settings(collector.endpoint))
    identify(account="acme")
    record("calls", 7)
    assert flush(60)
    record("calls", 5)
    assert flush(60)
    assert collector.totals() == {"calls": 12}
    assert len(set(collector.requests[:4])) == 1, "a retry must send the same bytes"


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN])
def test_what_opentelemetry_would_drop_is_kept(
    fresh: Runtime, start_collector: Any, settings: Any, status: grpc.StatusCode
) -> None:
    collector = start_collector(answer=lambda n: status if n == 0 else None)
    fresh.configure(settings(collector.endpoint))
    record("calls", 7)
    assert flush(60)
    assert collector.totals() == {"calls": 7}


def test_a_lost_acknowledgement_repeats_the_same_point(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    collector = start_collector(answer=lambda n: (UNAVAILABLE, "stored") if n < 2 else None)
    fresh.configure(settings(collector.endpoint))
    record("calls", 7)
    assert flush(60)
    assert len(collector.stored) == 3
    assert len(set(collector.stored)) == 1
    assert len(collector.points()) == 1
    assert collector.totals() == {"calls": 7}


def test_flush_is_truthful_and_punctual_when_nobody_answers(fresh: Runtime, settings: Any, unused_port: int) -> None:
    fresh.configure(settings(f"http://127.0.0.1:{unused_port}", timeout_s=30))
    assert flush(1), "nothing is recorded: nothing is missing"
    record("calls", 7)
    began = time.monotonic()
    assert flush(0.3) is False
    assert flush(0.3) is False
    assert time.monotonic() - began < 15, "it does not wait for the attempt, which may take twice that"
    assert fresh.undelivered() == {"calls": 7}


def test_flush_waits_for_what_is_on_its_way(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    may_answer = threading.Event()

    def slow(number: int) -> None:
        may_answer.wait(60)

    collector = start_collector(answer=slow)
    fresh.configure(settings(collector.endpoint, timeout_s=60, interval_s=0.01))
    record("calls", 1)
    wait_for(lambda: bool(collector.requests))
    assert not fresh.recorder, "it has been cut, but is not acknowledged"
    assert flush(0.05) is False
    may_answer.set()
    assert flush(60) is True
    assert collector.totals() == {"calls": 1}


def test_a_collector_that_comes_late(fresh: Runtime, start_collector: Any, settings: Any, unused_port: int) -> None:
    fresh.configure(settings(f"http://127.0.0.1:{unused_port}"))
    for _ in range(3):
        record("calls", 1)
        flush(0.2)
    collector = start_collector(port=unused_port)
    assert flush(60)
    assert collector.totals() == {"calls": 3}


def test_headers_and_resource_go_along(
    fresh: Runtime, collector: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=shop,service.instance.id=pod-7")
    fresh.configure(settings(collector.endpoint, headers=(("authorization", "Bearer t"),), resource=(("team", "x"),)))
    record("calls")
    assert flush(60)
    assert collector.metadata[0]["authorization"] == "Bearer t"
    for text in (b"images", b"shop", b"pod-7", b"team"):
        assert text in collector.requests[0]


def test_each_process_has_an_instance_of_its_own() -> None:
    first, second = (str(make_resource({}).attributes["service.instance.id"]) for _ in range(2))
    assert len(first) == 36
    assert first != second
    given = {"service.instance.id": "pod-7"}
    assert make_resource(given).attributes["service.instance.id"] == "pod-7"
    child = str(of_forked_child(make_resource(given)).attributes["service.instance.id"])
    assert child.startswith("pod-7/")
    assert len(child) == 6 + 36


def test_a_batch_the_collector_cannot_take_holds_up_nobody() -> None:
    client = ScriptedClient(lambda raw: b"poison" not in raw)
    parts = Parts(lambda: client)
    parts.add("poison")
    assert parts.exporter.flush(0.1) is False
    wait_for(lambda: bool(client.tried))  # cut: what follows is in other requests
    for n in range(5):
        parts.add(f"good-{n}")
        wait_for(lambda n=n: any(f"good-{n}".encode() in raw for raw in client.delivered))  # type: ignore[misc]
        parts.exporter.flush(0)
    wait_for(lambda: len(parts.outbox) == 1)  # a request has been taken a moment before it leaves the outbox
    assert [b.points for b in parts.outbox.batches()] == [2], "the usage and its control total"
    assert len({raw for raw in client.tried if b"poison" in raw}) == 1
    assert parts.exporter.shutdown(0.1) is False


def test_an_exporter_that_raises_is_tried_again() -> None:
    attempts = iter([RuntimeError("one"), RuntimeError("two")])

    def answer(raw: bytes) -> bool:
        for error in attempts:
            raise error
        return True

    client = ScriptedClient(answer)
    parts = Parts(lambda: client)
    parts.add("a")
    assert parts.exporter.flush(60)
    assert len(client.tried) == 3
    assert parts.exporter.shutdown(60)


def test_a_shutdown_does_not_wait_for_the_recovery_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, may_go_on, has_ended = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        arrived.set()
        may_go_on.wait(60)

    monkeypatch.setattr(Recovery, "run", slow)
    parts = Parts(lambda: ScriptedClient(lambda raw: True), place=tmp_path)
    parts.exporter.start()
    assert arrived.wait(60)
    thread = threading.Thread(target=lambda: (parts.exporter.shutdown(0.05), has_ended.set()))
    thread.start()
    ended_meanwhile = has_ended.wait(30)
    may_go_on.set()
    thread.join()
    assert ended_meanwhile


def test_a_channel_that_cannot_be_made_yet_is_tried_again() -> None:
    client = ScriptedClient(lambda raw: True)
    failing = iter([FileNotFoundError("certificate")])

    def connect() -> ScriptedClient:
        for error in failing:
            raise error
        return client

    parts = Parts(connect)
    parts.add("a")
    assert parts.exporter.flush(60)
    assert len(client.delivered) == 1
    parts.exporter.shutdown(1)


def test_a_full_outbox_makes_the_interval_longer() -> None:
    up = threading.Event()
    client = ScriptedClient(lambda raw: up.is_set())
    parts = Parts(lambda: client, max_bytes=200)
    parts.exporter.start()
    for _ in range(100):
        parts.add("acme")
        time.sleep(0.005)
    wait_for(lambda: parts.outbox.full)  # from here on nothing is cut
    assert 1 <= len(parts.outbox) <= 3
    held = sum(int(amount) for batch in parts.outbox.batches() for amount in batch.amounts.values())
    assert held + sum(int(q) for q in parts.recorder.sums().values()) == 100
    up.set()
    assert parts.exporter.flush(60)
    assert len(client.delivered) <= 5
    assert not parts.recorder
    parts.exporter.shutdown(1)


def test_flush_covers_what_a_full_outbox_kept_back() -> None:
    up = threading.Event()
    client = ScriptedClient(lambda raw: up.is_set())
    parts = Parts(lambda: client, max_bytes=1, interval_s=30)
    parts.add("a")
    assert not parts.exporter.flush(0.1)
    wait_for(lambda: parts.outbox.full)
    parts.add("b", 2**63 - 1)
    parts.add("b", 2**63 - 1)
    up.set()
    assert parts.exporter.flush(60)
    assert not parts.recorder
    assert len(client.delivered) == 2
    parts.exporter.shutdown(1)


def test_concurrent_flushes_all_tell_the_truth() -> None:
    client = ScriptedClient(lambda raw: True)
    parts = Parts(lambda: client, interval_s=30)
    wrong: list[str] = []

    def work(name: str) -> None:
        for n in range(30):
            parts.add(f"{name}-{n}.")
            delivered = parts.exporter.flush(60)
            if not delivered or not any(f"{name}-{n}.".encode() in raw for raw in list(client.delivered)):
                wrong.append(f"{name}-{n}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    parts.exporter.shutdown(1)


def test_configuring_twice(fresh: Runtime, collector: Any, start_collector: Any) -> None:
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    record("calls", 1)
    with pytest.raises(SettingsError, match="shutdown"):
        configure(endpoint="http://127.0.0.1:1")
    assert shutdown(60)
    record("calls", 2)
    assert flush(0.1) is False
    other = start_collector()
    configure(endpoint=other.endpoint, timeout=0.5, interval=60)
    assert flush(60)
    assert collector.totals() == {"calls": 1}
    assert other.totals() == {"calls": 2}


def test_undelivered_batches_follow_to_the_next_collector(fresh: Runtime, collector: Any, unused_port: int) -> None:
    configure(endpoint=f"http://127.0.0.1:{unused_port}", timeout=0.2, interval=60)
    record("calls", 3)
    assert shutdown(0.3) is False
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    assert flush(60)
    assert collector.totals() == {"calls": 3}


def test_usage_before_configure_is_kept_and_told_once(
    fresh: Runtime, collector: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        record("calls")
        fresh._on_first_usage()
    assert caplog.text.count("configure() has not been called") == 1
    fresh.configure(settings(collector.endpoint))
    wait_for(lambda: collector.totals() == {"calls": 5})
