from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tallymark.batches import batches_of
from tallymark.meters import Meter
from tallymark.outbox import Batch, Outbox
from tallymark.recorder import Cut


def batch(points: int = 1) -> Batch:
    return Batch(MetricsData([]), points, ())


def test_a_batch_stays_until_it_is_acknowledged() -> None:
    outbox = Outbox()
    first, second = batch(), batch()
    outbox.put(first)
    outbox.put(second)
    assert outbox.head() is first
    assert outbox.head() is first
    outbox.acknowledge(first)
    outbox.acknowledge(first)
    assert outbox.head() is second
    outbox.acknowledge(second)
    assert outbox.head() is None
    assert not outbox.full


def test_a_postponed_batch_is_tried_last() -> None:
    outbox = Outbox()
    batches = [batch() for _ in range(3)]
    for one in batches:
        outbox.put(one)
    outbox.postpone(batches[0])
    assert outbox.batches() == (batches[1], batches[2], batches[0])
    outbox.acknowledge(batches[0])
    outbox.postpone(batches[0])
    assert outbox.batches() == (batches[1], batches[2])


def test_full_is_a_matter_of_points() -> None:
    outbox = Outbox(max_points=10)
    big = batch(11)
    outbox.put(batch(9))
    assert not outbox.full
    outbox.put(big)
    assert outbox.full
    outbox.acknowledge(big)
    assert not outbox.full


def test_batches_are_bounded_in_points_and_bytes_and_lose_nothing() -> None:
    meter = Meter("m", "1")
    values = tuple(((meter, f"account-{n}", None, (("a", "string", "x" * 500),)), 1) for n in range(100))
    cut = Cut(1, 2, values)
    by_points = list(batches_of(cut, Resource({}), InstrumentationScope("s"), max_points=30))
    by_bytes = list(batches_of(cut, Resource({}), InstrumentationScope("s"), max_bytes=7_000))
    assert [b.points for b in by_points] == [30, 30, 30, 10]
    assert max(len(encode_metrics(b.data).SerializeToString()) for b in by_bytes) <= 7_000
    assert 10 <= len(by_bytes) <= 12
    assert sum(b.points for b in by_bytes) == sum(b.points for b in by_points) == 100
    assert sum(int(dict(b.amounts)["m"]) for b in by_bytes) == 100
