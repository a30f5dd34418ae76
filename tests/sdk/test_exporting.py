"""Delivery: what was recorded arrives once, whatever the collector does, and `flush` tells the truth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tallymark import configure, flush, identify, record, shutdown
from tallymark.errors import SettingsError
from tallymark.exporting import UsageExporter
from tallymark.meters import Meter
from tallymark.outbox import Outbox
from tallymark.recorder import Recorder
from tallymark.reporting import Reporter
from tallymark.resource import make_resource, of_forked_child
from tallymark.runtime import Runtime

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class ScriptedClient:
    """Answers each export by `answer`, which may raise; keeps what it was given, encoded."""

    def __init__(self, answer: Callable[[bytes], bool]) -> None:
        self.answer = answer
        self.tried: list[bytes] = []
        self.delivered: list[bytes] = []

    def export(self, metrics_data: MetricsData) -> MetricExportResult:
        raw = encode_metrics(metrics_data).SerializeToString()
        self.tried.append(raw)
        if self.answer(raw):
            self.delivered.append(raw)
            return MetricExportResult.SUCCESS
        return MetricExportResult.FAILURE

    def shutdown(self) -> None:
        pass


def exporter_to(client: ScriptedClient, recorder: Recorder, outbox: Outbox, interval_s: float = 0.02) -> UsageExporter:
    return UsageExporter(
        recorder,
        outbox,
        connect=lambda: client,
        resource=Resource({"service.instance.id": "i"}),
        scope=InstrumentationScope("tallymark"),
        interval_s=interval_s,
        reporter=Reporter(),
    )


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
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
    assert flush(20)
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
        total += amount
    fresh.configure(settings(collector.endpoint))
    assert flush(5)
    assert collector.totals() == {"gb": total}


def test_a_collector_that_fails_at_first_loses_nothing(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    collector = start_collector(answer=lambda n: UNAVAILABLE if n < 3 else None)
    fresh.configure(settings(collector.endpoint))
    identify(account="acme")
    record("calls", 7)
    assert flush(15)
    record("calls", 5)
    assert flush(5)
    assert collector.totals() == {"calls": 12}
    assert len(set(collector.requests[:4])) == 1, "a retry must send the same bytes"


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN])
def test_what_opentelemetry_would_drop_is_kept(
    fresh: Runtime, start_collector: Any, settings: Any, status: grpc.StatusCode
) -> None:
    collector = start_collector(answer=lambda n: status if n == 0 else None)
    fresh.configure(settings(collector.endpoint))
    record("calls", 7)
    assert flush(5)
    assert collector.totals() == {"calls": 7}


def test_a_lost_acknowledgement_repeats_the_same_point(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    collector = start_collector(answer=lambda n: (UNAVAILABLE, "stored") if n < 2 else None)
    fresh.configure(settings(collector.endpoint))
    record("calls", 7)
    assert flush(10)
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
    assert time.monotonic() - began < 1.5
    assert fresh.undelivered() == {"calls": 7}


def test_flush_waits_for_what_is_on_its_way(fresh: Runtime, start_collector: Any, settings: Any) -> None:
    def slow(number: int) -> None:
        time.sleep(0.4)

    collector = start_collector(answer=slow)
    fresh.configure(settings(collector.endpoint, timeout_s=5, interval_s=0.01))
    record("calls", 1)
    wait_for(lambda: bool(collector.requests))
    assert not fresh.recorder, "it has been cut, but is not acknowledged"
    assert flush(0.05) is False
    assert flush(5) is True
    assert collector.totals() == {"calls": 1}


def test_a_collector_that_comes_late(fresh: Runtime, start_collector: Any, settings: Any, unused_port: int) -> None:
    fresh.configure(settings(f"http://127.0.0.1:{unused_port}"))
    for _ in range(3):
        record("calls", 1)
        flush(0.2)
    collector = start_collector(port=unused_port)
    assert flush(15)
    assert collector.totals() == {"calls": 3}


def test_headers_and_resource_go_along(
    fresh: Runtime, collector: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=shop,service.instance.id=pod-7")
    fresh.configure(settings(collector.endpoint, headers=(("authorization", "Bearer t"),), resource=(("team", "x"),)))
    record("calls")
    assert flush(5)
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
    recorder, outbox = Recorder(0), Outbox()
    client = ScriptedClient(lambda raw: b"poison" not in raw)
    exporter = exporter_to(client, recorder, outbox)
    meter = Meter("m", "1")
    recorder.add((meter, "poison", None, ()), 1)
    assert exporter.flush(0.1) is False
    for n in range(5):
        recorder.add((meter, f"good-{n}", None, ()), 1)
        wait_for(lambda n=n: any(f"good-{n}".encode() in raw for raw in client.delivered))  # type: ignore[misc]
    assert [b.points for b in outbox.batches()] == [1]
    assert len({raw for raw in client.tried if b"poison" in raw}) == 1
    assert exporter.shutdown(0.1) is False


def test_an_exporter_that_raises_is_tried_again() -> None:
    attempts = iter([RuntimeError("one"), RuntimeError("two")])

    def answer(raw: bytes) -> bool:
        for error in attempts:
            raise error
        return True

    recorder, outbox = Recorder(0), Outbox()
    client = ScriptedClient(answer)
    exporter = exporter_to(client, recorder, outbox)
    recorder.add((Meter("m", "1"), "a", None, ()), 1)
    assert exporter.flush(5)
    assert len(client.tried) == 3
    assert exporter.shutdown(1)


def test_a_channel_that_cannot_be_made_yet_is_tried_again() -> None:
    recorder, outbox = Recorder(0), Outbox()
    client = ScriptedClient(lambda raw: True)
    failing = iter([FileNotFoundError("certificate")])

    def connect() -> ScriptedClient:
        for error in failing:
            raise error
        return client

    exporter = UsageExporter(
        recorder,
        outbox,
        connect=connect,
        resource=Resource({}),
        scope=InstrumentationScope("t"),
        interval_s=0.02,
        reporter=Reporter(),
    )
    recorder.add((Meter("m", "1"), "a", None, ()), 1)
    assert exporter.flush(5)
    assert len(client.delivered) == 1
    exporter.shutdown(1)


def test_a_full_outbox_makes_the_interval_longer() -> None:
    recorder, outbox = Recorder(0), Outbox(max_points=2)
    up = threading.Event()
    client = ScriptedClient(lambda raw: up.is_set())
    exporter = exporter_to(client, recorder, outbox)
    meter = Meter("m", "1")
    exporter.start()
    for _ in range(100):
        recorder.add((meter, "acme", None, ()), 1)
        time.sleep(0.005)
    assert len(outbox) <= 2
    held = sum(int(amount) for batch in outbox.batches() for _, amount in batch.amounts)
    assert held + sum(int(q) for q in recorder.sums().values()) == 100
    up.set()
    assert exporter.flush(5)
    assert len(client.delivered) <= 4
    assert not recorder
    exporter.shutdown(1)


def test_flush_covers_what_a_full_outbox_kept_back() -> None:
    recorder, outbox = Recorder(0), Outbox(max_points=1)
    up = threading.Event()
    client = ScriptedClient(lambda raw: up.is_set())
    exporter = exporter_to(client, recorder, outbox, interval_s=30)
    meter = Meter("m", "1")
    recorder.add((meter, "a", None, ()), 1)
    assert not exporter.flush(0.1)
    recorder.add((meter, "b", None, ()), 2**63 - 1)
    recorder.add((meter, "b", None, ()), 2**63 - 1)
    up.set()
    assert exporter.flush(5)
    assert not recorder
    assert len(client.delivered) == 3
    exporter.shutdown(1)


def test_concurrent_flushes_all_tell_the_truth() -> None:
    recorder, outbox = Recorder(0), Outbox()
    client = ScriptedClient(lambda raw: True)
    exporter = exporter_to(client, recorder, outbox, interval_s=30)
    meter = Meter("m", "1")
    wrong: list[str] = []

    def work(name: str) -> None:
        for n in range(30):
            recorder.add((meter, f"{name}-{n}.", None, ()), 1)
            if not exporter.flush(5) or not any(f"{name}-{n}.".encode() in raw for raw in list(client.delivered)):
                wrong.append(f"{name}-{n}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    exporter.shutdown(1)


def test_configuring_twice(fresh: Runtime, collector: Any, start_collector: Any) -> None:
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    record("calls", 1)
    with pytest.raises(SettingsError, match="shutdown"):
        configure(endpoint="http://127.0.0.1:1")
    assert shutdown(5)
    record("calls", 2)
    assert flush(0.1) is False
    other = start_collector()
    configure(endpoint=other.endpoint, timeout=0.5, interval=60)
    assert flush(5)
    assert collector.totals() == {"calls": 1}
    assert other.totals() == {"calls": 2}


def test_undelivered_batches_follow_to_the_next_collector(fresh: Runtime, collector: Any, unused_port: int) -> None:
    configure(endpoint=f"http://127.0.0.1:{unused_port}", timeout=0.2, interval=60)
    record("calls", 3)
    assert shutdown(0.3) is False
    configure(endpoint=collector.endpoint, timeout=0.5, interval=60)
    assert flush(5)
    assert collector.totals() == {"calls": 3}


def test_usage_before_configure_is_kept_and_told_once(
    fresh: Runtime, collector: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        record("calls")
        fresh.recorder.take_back(fresh.recorder.cut(0))
    assert caplog.text.count("configure() has not been called") == 1
    fresh.configure(settings(collector.endpoint))
    wait_for(lambda: collector.totals() == {"calls": 5})
