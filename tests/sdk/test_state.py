"""The SDK's own state, in the host's monitoring and by `delivery_stats()`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from tallymark import observation, testing
from tallymark.reporting import Reporter
from tallymark.state import SHOWN, State, StateInstruments
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.sdk.fake_collector import FakeCollector

READ = """
    import os, resource, sys, time
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    import tallymark
    from tallymark.observation import delivery_stats

    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))

    def shown():
        found, data = {}, reader.get_metrics_data()
        for of in data.resource_metrics if data else ():
            for scope in of.scope_metrics:
                assert scope.scope.name == "tallymark.mirror"
                for metric in scope.metrics:
                    if metric.name.startswith("tallymark.sdk."):
                        (point,) = metric.data.data_points
                        assert not point.attributes
                        found[metric.name.removeprefix("tallymark.sdk.")] = point.value
        return found
"""


def test_a_full_disk_shows(run_script: Callable[..., Any], collector: FakeCollector) -> None:
    done = run_script(
        READ
        + """
    tallymark.configure(mirror=True, interval=3600)
    before = shown()
    assert before == {"in_memory": 0, "dead_letters": 0, "held_back": 0, "refused": 0,
                      "outbox.size": 0, "outbox.requests": 0}, before
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for n in range(100):
        with tallymark.identify(account=f"account-{n}"):
            tallymark.record("calls", 1)
    tallymark.record("calls", -1)
    now = shown()
    assert now["in_memory"] == delivery_stats()["in_memory"] > 0, now
    assert now["refused"] == 1, now
    assert tallymark.flush(60)
    now = shown()
    assert now["outbox.size"] == now["outbox.requests"] == 0, now
    assert 0 <= now["acknowledged.age"] < 3600, now
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 100}


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (grpc.StatusCode.UNAVAILABLE, 'now["outbox.requests"] and now["outbox.size"] and not now["dead_letters"]'),
        (grpc.StatusCode.INVALID_ARGUMENT, 'now["dead_letters"] == delivery_stats()["rejected_points"] > 0'),
    ],
)
def test_a_collector_that_takes_nothing_shows(
    run_script: Callable[..., Any], start_collector: Callable[..., FakeCollector], answer: grpc.StatusCode, seen: str
) -> None:
    done = run_script(
        READ
        + f"""
    tallymark.configure(mirror=True, interval=0.05, shutdown_timeout=0.1)
    tallymark.record("calls", 1)
    deadline = time.monotonic() + 60
    while not ((now := shown()) and {seen}):
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    assert "acknowledged.age" not in now, now
    """,
        TALLYMARK_ENDPOINT=start_collector(lambda n: answer).endpoint,
    )
    assert done.returncode == 0, done.stderr


def test_a_child_shows_its_own_and_who_switches_the_mirror_off_nothing(
    run_script: Callable[..., Any], collector: FakeCollector
) -> None:
    done = run_script(
        READ
        + """
    tallymark.configure(mirror=True, interval=3600)
    tallymark.record("calls", -1)
    child = os.fork()
    if not child:
        assert shown()["refused"] == 0, shown()
        tallymark.record("calls", -1); tallymark.record("calls", -1)
        assert shown()["refused"] == 2, shown()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert shown()["refused"] == 1, shown()
    tallymark.shutdown(60)
    tallymark.configure(mirror=False)
    assert shown() == {}, shown()
    assert delivery_stats()["refused"] == 1
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


class Broken:
    """Whose state cannot be read."""

    reporter = Reporter()

    def state(self) -> State | None:
        raise RuntimeError("broken")


class Well:
    reporter = Reporter()

    def state(self) -> State | None:
        return State(1, 2, 3, 4, 5, 6, 7.5)


def test_what_raises_in_it_does_not_harm_the_host(caplog: pytest.LogCaptureFixture) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    provider.get_meter("host").create_counter("of.the.host").add(1)
    StateInstruments(Broken, "1", provider).show()
    data = reader.get_metrics_data()
    assert data is not None
    names = [m.name for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.data.data_points]
    assert names == ["of.the.host"]
    assert "cannot be shown: RuntimeError('broken')" in caplog.text


def test_none_of_it_is_usage_to_a_collector() -> None:
    reader = InMemoryMetricReader()
    StateInstruments(Well, "1", MeterProvider([reader], shutdown_on_exit=False)).show()
    data = reader.get_metrics_data()
    assert data is not None
    body = encode_metrics(data).SerializeToString()
    (scope,) = ExportMetricsServiceRequest.FromString(body).resource_metrics[0].scope_metrics
    assert {metric.name for metric in scope.metrics} == {shown.name for shown in SHOWN}
    found = decode_metrics("default", body, StreamCache(), TimeLimits(), time.time_ns())
    assert (len(found.points), len(found.quarantined)) == (0, 0)


def test_both_names_are_one() -> None:
    assert testing.delivery_stats is observation.delivery_stats
