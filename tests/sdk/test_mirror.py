"""The mirror shows exactly what was recorded, is never billed, and harms nobody."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)

from tallymark.meters import Meter
from tallymark.mirror import MAX_SETS, Instruments, Mirror
from tallymark.quantities import exact
from tallymark.recorder import Recorder
from tallymark.reporting import Reporter
from tallymark.segment import Segment
from tallymark.streams import Series
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.sdk.fake_collector import FakeCollector

REQUESTS = Meter("api.requests", "{request}")
TOKENS = Meter("llm.tokens", "{token}")
SEARCH = (("http.route", "string", "/search"),)
OVERFLOW = (("otel.metric.overflow", True),)

Shown = dict[str, dict[tuple[tuple[str, Any], ...], float]]


class Parts:
    """A recorder and its mirror on a provider of the test's own."""

    def __init__(self, with_accounts: bool = False, *readers: MetricReader) -> None:
        self.recorder = Recorder(time.time_ns())
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader, *readers], shutdown_on_exit=False)
        self.instruments = Instruments(lambda: self.mirror, "1", self.provider)
        self.mirror = Mirror(self.recorder, self.instruments, Reporter())
        self.mirror.open(with_accounts, [(REQUESTS.name, REQUESTS.unit)])

    def add(self, series: Series, quantity: object, account: str | None = "acme", plan: str | None = None) -> None:
        self.recorder.add((series, account, plan), exact(quantity))

    def cut(self) -> None:
        self.recorder.cut(time.time_ns())
        wait_for(lambda: self.instruments._wanted == self.instruments._made)

    def shown(self) -> Shown:
        return sums(self.reader.get_metrics_data())


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sums(data: MetricsData | None) -> Shown:
    found: Shown = {}
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                assert metric.data.is_monotonic  # type: ignore[union-attr]
                for point in metric.data.data_points:
                    attributes = tuple(sorted((point.attributes or {}).items()))
                    found.setdefault(metric.name, {})[attributes] = point.value  # type: ignore[union-attr]
    return found


def test_what_is_recorded_is_shown_at_once_and_stays() -> None:
    parts = Parts()
    search, plain = Series(REQUESTS, SEARCH), Series(REQUESTS, ())
    assert parts.shown() == {}
    for _ in range(3):
        parts.add(search, 2, "acme", "pro")
        parts.add(search, 1, "globex")
    parts.add(plain, 5, None)
    expected = {(("http.route", "/search"), ("tallymark.plan", "pro")): 6, (("http.route", "/search"),): 3, (): 5}
    assert parts.shown() == {"api.requests": expected}
    parts.cut()
    assert parts.shown() == {"api.requests": expected}
    parts.cut()
    parts.add(Series(REQUESTS, SEARCH), 10, "acme")
    assert parts.shown() == {"api.requests": {**expected, (("http.route", "/search"),): 13}}


def test_accounts_are_shown_where_that_is_asked_for() -> None:
    parts = Parts(with_accounts=True)
    series = Series(REQUESTS, ())
    parts.add(series, 2, "acme")
    parts.add(series, 3, "globex")
    parts.add(series, 4, None)
    parts.cut()
    parts.add(series, 1, "acme")
    account = "tallymark.account"
    assert parts.shown() == {"api.requests": {((account, "acme"),): 3, ((account, "globex"),): 3, (): 4}}


def test_a_meter_that_is_new_is_shown_after_a_cut() -> None:
    parts = Parts()
    parts.add(Series(TOKENS, ()), Decimal("0.1"))
    assert "llm.tokens" not in parts.shown()
    parts.cut()
    parts.add(Series(TOKENS, ()), Decimal("0.2"))
    assert parts.shown() == {"llm.tokens": {(): 0.3}}


def test_sets_over_the_bound_are_added_up_in_the_overflow() -> None:
    parts = Parts()
    count = MAX_SETS + 500
    series = [Series(REQUESTS, (("n", "int", n),)) for n in range(count)]
    for one in series[: MAX_SETS - 10]:
        parts.add(one, 1)
    parts.cut()
    before: Shown = {}
    for _ in range(3):
        for one in series:
            parts.add(one, 1)
        now = parts.shown()
        assert len(now["api.requests"]) == 2_000
        assert all(now["api.requests"][of] >= value for of, value in before.get("api.requests", {}).items())
        parts.cut()
        assert parts.shown() == now
        before = now
    assert now["api.requests"][OVERFLOW] == 3 * 500
    assert sum(now["api.requests"].values()) == 3 * count + MAX_SETS - 10
    assert now["api.requests"][(("n", 0),)] == 4


def test_one_true_and_1_0_are_three_series() -> None:
    parts = Parts()
    for n, (kind, value) in enumerate((("int", 1), ("bool", True), ("double", 1.0)), start=1):
        parts.add(Series(REQUESTS, (("v", kind, value),)), n)
    parts.cut()
    data = parts.reader.get_metrics_data()
    assert data is not None
    points = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
    assert sorted(point.value for point in points) == [1, 2, 3]  # type: ignore[union-attr]


def test_a_sum_over_int64_does_not_lose_the_hosts_batch() -> None:
    parts = Parts()
    series = Series(REQUESTS, ())
    for _ in range(3):
        parts.add(series, 2**63 - 1)
    data = parts.reader.get_metrics_data()
    assert sums(data) == {"api.requests": {(): float(3 * (2**63 - 1))}}
    assert data is not None
    assert encode_metrics(data).SerializeToString()


def test_threads_record_and_cuts_come_while_two_readers_collect() -> None:
    delta = InMemoryMetricReader({ObservableCounter: AggregationTemporality.DELTA})
    parts = Parts(True, delta)
    series = [Series(REQUESTS, ()), Series(TOKENS, ())]
    parts.add(series[1], 1, "t0")
    parts.cut()
    recorded: Counter[tuple[str, str]] = Counter({("llm.tokens", "t0"): 1})
    lock, stop = threading.Lock(), threading.Event()

    def work(name: str) -> None:
        own: Counter[tuple[str, str]] = Counter()
        for n in range(20_000):
            parts.add(series[n % 2], n % 5, name)
            own[series[n % 2].meter.name, name] += n % 5
        with lock:
            recorded.update(own)

    def cut() -> None:
        while not stop.is_set():
            parts.recorder.cut(time.time_ns())

    workers = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(3)]
    cutter = threading.Thread(target=cut)
    for thread in (*workers, cutter):
        thread.start()
    before: Shown = {}
    increases: Counter[tuple[str, str]] = Counter()

    def collect() -> None:
        nonlocal before
        now = parts.shown()
        for meter, sets in before.items():
            assert all(now[meter][of] >= value for of, value in sets.items())
        before = now
        for meter, sets in sums(delta.get_metrics_data()).items():
            for attributes, value in sets.items():
                assert value >= 0
                increases[meter, dict(attributes)["tallymark.account"]] += int(value)

    while any(worker.is_alive() for worker in workers):
        collect()
    for worker in workers:
        worker.join()
    stop.set()
    cutter.join()
    collect()
    total = {(meter, of[0][1]): value for meter, sets in before.items() for of, value in sets.items()}
    assert total == +recorded
    assert +increases == +recorded


class CutRightAfter(Recorder):
    """Cut as soon as its reading has ended."""

    @contextmanager
    def between_cuts(self) -> Iterator[list[bytes]]:
        with super().between_cuts() as copies:
            yield copies
        self.cut(time.time_ns())


def test_a_cut_right_after_the_reading() -> None:
    parts = Parts()
    series = Series(REQUESTS, ())
    parts.recorder.__class__ = CutRightAfter
    for n in range(1, 4):
        parts.add(series, 1)
        assert parts.shown() == {"api.requests": {(): n}}


def test_opened_again_it_goes_on_and_closed_it_shows_nothing() -> None:
    parts = Parts()
    series = Series(REQUESTS, ())
    parts.add(series, 1)
    parts.mirror.close()
    assert parts.shown() == {}
    parts.cut()
    parts.add(series, 2)
    parts.mirror.open(False, [])
    assert parts.shown() == {"api.requests": {(): 3}}
    parts.mirror.open(True, [])
    assert parts.shown() == {"api.requests": {(("tallymark.account", "acme"),): 2}}


class Broken(Recorder):
    """Whose reading fails."""

    def between_cuts(self) -> Any:
        raise RuntimeError("broken")


def test_what_raises_in_it_harms_neither_the_host_nor_delivery(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts()
    own = parts.provider.get_meter("host").create_counter("of.the.host")
    own.add(1)
    parts.add(Series(REQUESTS, ()), 2)
    parts.recorder.__class__ = Broken
    assert parts.shown() == {"of.the.host": {(): 1}}
    assert "usage could not be mirrored: RuntimeError('broken')" in caplog.text
    parts.recorder.__class__ = Recorder

    def contents() -> Any:
        raise MemoryError

    (segment,) = [s for s in [parts.recorder._segment] if s is not None]
    segment.contents = contents  # type: ignore[method-assign]
    taken = parts.recorder.cut(time.time_ns())
    assert [type(one) for one in taken] == [Segment]
    assert "usage is mirrored no longer" in caplog.text
    assert parts.shown() == {"of.the.host": {(): 1}}


def test_a_callback_of_the_host_that_hangs_stops_no_cut() -> None:
    parts = Parts()
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: CallbackOptions) -> Iterable[Observation]:
        hangs.set()
        assert goes_on.wait(60)
        return []

    parts.provider.get_meter("host").create_observable_counter("hanging", [hang])
    collecting = threading.Thread(target=parts.reader.collect)
    collecting.start()
    assert hangs.wait(60)
    parts.add(Series(TOKENS, ()), 7)
    assert len(parts.recorder.cut(time.time_ns())) == 1
    assert ("llm.tokens", "{token}") not in parts.instruments._made
    goes_on.set()
    collecting.join()
    wait_for(lambda: ("llm.tokens", "{token}") in parts.instruments._made)
    assert parts.shown() == {"llm.tokens": {(): 7}}


class Kept(MetricExporter):
    """What the host's OTLP exporter would send."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        self.bodies.append(encode_metrics(metrics_data).SerializeToString())
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        pass


def test_the_collector_never_bills_it_though_the_hosts_pipeline_leads_to_it() -> None:
    exporter = Kept()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
    parts = Parts(True, reader)
    parts.add(Series(REQUESTS, SEARCH), 5, "acme", "pro")
    reader.shutdown()
    message = ExportMetricsServiceRequest.FromString(exporter.bodies[0])
    assert b"acme" in exporter.bodies[0]
    assert billed(message) == (0, 0)
    (scope,) = message.resource_metrics[0].scope_metrics
    scope.scope.name = "renamed by a gateway"
    assert billed(message) == (0, 0)
    for attribute in scope.metrics[0].sum.data_points[0].attributes:
        attribute.key = attribute.key.replace("tallymark.account", "tallymark.account.id")
    scope.scope.name = "tallymark.mirror"
    assert billed(message) == (0, 0)
    scope.scope.name = "renamed by a gateway"
    assert billed(message) == (1, 0)


def billed(message: ExportMetricsServiceRequest) -> tuple[int, int]:
    found = decode_metrics("default", message.SerializeToString(), StreamCache(), TimeLimits(), time.time_ns())
    return len(found.points), len(found.quarantined)


SHOW = """
    import os, sys
    from collections import Counter
    from opentelemetry import metrics
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import REGISTRY
    import tallymark

    @tallymark.track_usage("api.requests")
    def call(): pass

    def provide():
        metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))

    def total(**labels):
        return {sample.labels.get("tallymark_account", ""): sample.value for family in REGISTRY.collect()
                for sample in family.samples if sample.name == "api_requests_total"}

    def use(account, times):
        with tallymark.identify(account=account):
            for _ in range(times):
                call()
"""


@pytest.mark.parametrize("before", [True, False])
def test_prometheus_whether_the_provider_is_set_before_or_after(
    run_script: Callable[..., Any], collector: FakeCollector, before: bool
) -> None:
    result = run_script(
        SHOW
        + f"""
    if {before}: provide()
    use("acme", 2)
    tallymark.configure()
    if not {before}: provide()
    use("acme", 3); use("globex", 1)
    assert total() == {{"acme": 5, "globex": 1}}, total()
    assert tallymark.flush(60)
    use("acme", 1)
    assert total() == {{"acme": 6, "globex": 1}}, total()
    assert tallymark.shutdown(60)
    use("globex", 1)
    assert total() == {{"acme": 6, "globex": 2}}, total()
    tallymark.configure()
    use("globex", 1)
    assert total() == {{"acme": 6, "globex": 3}}, total()
    tallymark.shutdown(20)
    tallymark.configure(mirror=False)
    assert total() == {{}}, total()
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_MIRROR="accounts",
        TALLYMARK_TIMEOUT="10",
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert collector.totals() == {"api.requests": 9}


def test_a_forked_child_shows_its_own(run_script: Callable[..., Any], collector: FakeCollector) -> None:
    result = run_script(
        SHOW
        + """
    provide()
    tallymark.configure(mirror=True)
    use("acme", 5)
    assert total() == {"": 5}
    child = os.fork()
    if not child:
        assert total() == {}, total()
        use("acme", 2); use("globex", 2)
        assert total() == {"": 4}, total()
        assert tallymark.flush(60)
        assert total() == {"": 4}, total()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    use("acme", 1)
    assert total() == {"": 6}, total()
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_TIMEOUT="10",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert collector.totals() == {"api.requests": 10}


def test_who_does_not_ask_for_it_makes_no_instrument(run_script: Callable[..., Any], collector: FakeCollector) -> None:
    result = run_script(
        SHOW + "    provide(); tallymark.configure(); use('acme', 1); tallymark.flush(20); assert total() == {}\n",
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (result.returncode, result.stderr) == (0, "")
