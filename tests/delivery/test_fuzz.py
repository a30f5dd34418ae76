"""Damaged requests on three levels: nothing is raised but what is documented, nothing is kept by halves.

These are few: `make fuzz` takes as many as it is told. TALLYMARK_TEST_FUZZ and TALLYMARK_TEST_SEED say how many here,
and which.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

from tallymark_collector.processors import decoding, set_aside
from tests.delivery.fuzz.checks import Broken
from tests.delivery.fuzz.corpus import NOW, corpus
from tests.delivery.fuzz.decoder import Decoder
from tests.delivery.fuzz.large import EDGES, FLOODS, flood, large_input
from tests.delivery.fuzz.metered import METERS, TENANTS, metered_corpus
from tests.delivery.fuzz.mutation import Input, Sent, input_of
from tests.delivery.fuzz.reckoning import reckon
from tests.delivery.fuzz.runs import LEVELS, SHARES, Result, failures, play, table
from tests.delivery.fuzz.wire_format import census

INPUTS = int(os.environ.get("TALLYMARK_TEST_FUZZ", "5000"))
SEED = int(os.environ.get("TALLYMARK_TEST_SEED", "0")) or 78
"""The same inputs each time: what others find is for `make fuzz`, which takes a new seed."""
LEAST = 400
"""Inputs of a level whose share would be too few to meet every kind of damage."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_breaks(level: str) -> None:
    numbers = range(max(LEAST, round(INPUTS * SHARES[level])))
    # Not below pytest's folder: the server's user may not enter that, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="tallymark-fuzz-") as folder:
        result = play(level, Path(folder), SEED, numbers, lambda _: None)
    print(f"seed {SEED}", *table([result]), sep="\n")
    assert not result.counts["broken"], "\n".join([f"seed {SEED}", *failures([result])])
    assert result.counts["accepted"] > len(numbers) / 5, "most of what is damaged beyond reading tells nothing"
    assert result.counts["refused"] > len(numbers) / 5


def test_a_number_is_the_same_input_for_ever() -> None:
    samples = corpus()
    assert [input_of(samples, 3, number) for number in range(50)] == [
        input_of(samples, 3, number) for number in reversed(range(50))
    ][::-1]
    assert len({input_of(samples, 3, number).body for number in range(50)}) > 45


def test_the_corpus_is_valid_and_every_kind_of_point_is_in_it() -> None:
    counted: Counter[str] = Counter()
    for number, sample in enumerate(corpus()):
        for media, body in (("protobuf", sample.protobuf), ("json", sample.json)):
            decoder = Decoder()
            decoder.take(Input(number, sample.signal, media, body, "none"))
            assert decoder.counts["accepted"] == 1
        if sample.signal == "metrics":
            counted.update(vars(census(sample.protobuf)))
    kinds = ("usage", "ended", "kept_aside", "control", "foreign")
    assert all(counted[kind] for kind in kinds)


def test_every_meter_of_the_file_counts_and_refuses_something() -> None:
    counted: Counter[str] = Counter()
    worth: Counter[str] = Counter()
    for number, sample in enumerate(metered_corpus()):
        for media, body in (("protobuf", sample.protobuf), ("json", sample.json)):
            decoder = Decoder()
            decoder.take(Input(2 * number, sample.signal, media, body, "none", by_file=True))
            assert decoder.all_counts["accepted"] == decoder.all_counts["by the file, counted"] == 1
        for tenant in TENANTS:
            found = reckon(sample.signal, sample.protobuf, tenant)
            counted += found.taken
            worth.update(meter for meter, _, _ in found.worth.elements())
    assert set(worth) == set(METERS)
    assert {"gateway.requests", "storage", "llm.tokens"} <= set(counted - worth), "of nobody, or no quantity"


def test_large_inputs_lie_on_both_sides_of_each_limit() -> None:
    inputs = [large_input(1, number, NOW) for number in range(150)]
    met = {tuple(one.damage.partition(": ")[2].rsplit(" ", 1)) for one in inputs if one.damage.startswith("large")}
    assert met == {(edge, step) for edge in EDGES for step in ("-1", "+0", "+1")}
    assert all(any(one.sent and one.sent[field] for one in inputs) for field in range(5))


def test_of_what_is_too_much_to_be_kept_aside_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_aside, "MAX_BYTES", 8 * 2**20)
    decoder = Decoder()
    for share in FLOODS:
        decoder.take(flood(0, NOW, share))
    assert (decoder.counts["accepted"], decoder.counts["refused"]) == (1, 1)


@pytest.mark.parametrize("name", ["tallymark.control.part", "tallymark.control.parts"])
def test_an_index_of_profiles_says_nothing_of_a_total(name: str) -> None:
    """OTLP has such a value "processed as if it were absent"; to some versions of its messages it is unknown."""
    message = control_request()
    [metric] = [one for one in message.resource_metrics[0].scope_metrics[0].metrics if one.name.endswith(".total")]
    del metric.sum.data_points[:2]
    index = KeyValue(key=name)
    index.value.MergeFromString(b"\x40\x07")
    metric.sum.data_points[0].attributes.append(index)
    assert_accepted(message)


@pytest.mark.parametrize("other", ["before", "after"])
@pytest.mark.parametrize("scope", ["tallymark.control", "foreign"])
def test_the_same_total_of_another_metric_is_another_statement(scope: str, other: str) -> None:
    """It has as many points as it has: a part of one of them is said twice."""
    message = control_request()
    scopes = message.resource_metrics[0].scope_metrics
    added = scopes.add()
    added.CopyFrom(scopes[0])
    added.scope.name = scope
    [metric] = [one for one in scopes[0 if other == "after" else 1].metrics if one.name.endswith(".total")]
    metric.sum.data_points.append(metric.sum.data_points[0])
    assert_accepted(message)


def control_request() -> ExportMetricsServiceRequest:
    """The corpus's control totals: one of two parts, one of one."""
    [sample] = [found for found in corpus() if b"tallymark.control.total" in found.protobuf]
    return ExportMetricsServiceRequest.FromString(sample.protobuf)


def assert_accepted(message: ExportMetricsServiceRequest) -> None:
    decoder = Decoder()
    decoder.take(Input(0, "metrics", "protobuf", message.SerializeToString(), "none"))
    assert (decoder.counts["accepted"], decoder.counts["quarantined"]) == (1, 0)


@pytest.mark.parametrize("change", [Decimal(1), Decimal(-1), Decimal("0.5")])
def test_a_total_that_nobody_sent_is_seen(change: Decimal, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.delivery.fuzz import decoder

    def broken(*arguments: object) -> decoding.Decoded:
        found = decoding.decode_metrics(*arguments)  # type: ignore[arg-type]
        found.controls[:] = [told._replace(total=told.total + change) for told in found.controls]
        return found

    monkeypatch.setattr(decoder, "decode_metrics", broken)
    with pytest.raises(Broken, match="a total that nobody sent"):
        Decoder().take(Input(0, "metrics", "protobuf", control_request().SerializeToString(), "none"))


@pytest.mark.parametrize("promise", ["a point is lost", "another value the second time", "an error that is not ours"])
def test_what_is_broken_is_seen(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves, against a decoder that is broken on purpose."""
    from tests.delivery.fuzz import decoder

    calls = 0

    def broken(*arguments: object) -> decoding.Decoded:
        nonlocal calls
        calls += 1
        found = decoding.decode_metrics(*arguments)  # type: ignore[arg-type]
        if promise == "a point is lost":
            found.points.pop()
        elif promise == "an error that is not ours":
            raise ValueError
        elif calls == 2:
            found.points[0] = found.points[0]._replace(value=found.points[0].value + 1)
        return found

    monkeypatch.setattr(decoder, "decode_metrics", broken)
    sample = corpus()[0]
    with pytest.raises((Broken, ValueError)):
        Decoder().take(Input(0, sample.signal, "protobuf", sample.protobuf, "none"))


@pytest.mark.parametrize("promise", ["lost", "twice", "another value", "another account", "passed over"])
def test_what_the_file_of_meters_breaks_is_seen(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.delivery.fuzz import by_file

    def broken(*arguments: object) -> decoding.Decoded:
        found = decoding.decode_metrics(*arguments)  # type: ignore[arg-type]
        first = found.points[0]
        if promise == "lost":
            found.points.pop()
        elif promise == "twice":
            found.points.append(first)
        elif promise == "another value":
            found.points[0] = first._replace(value=first.value + 1)
        elif promise == "another account":
            series = replace(first.stream.series, account="globex")
            found.points[0] = first._replace(stream=replace(first.stream, series=series))
        else:
            found.unmatched += 1
        return found

    monkeypatch.setattr(by_file, "decode_metrics", broken)
    sample = metered_corpus()[0]
    with pytest.raises(Broken, match=r"items of meters|worth what nobody sent|passed over"):
        Decoder().take(Input(0, sample.signal, "protobuf", sample.protobuf, "none", by_file=True))


@pytest.mark.parametrize("number", range(1, 4))
def test_another_number_than_was_sent_is_seen(number: int) -> None:
    given = next(one for one in (large_input(SEED, at, NOW) for at in range(100)) if one.sent and one.sent.rejected)
    assert given.sent is not None
    wrong = Sent(*(value + (place == number) for place, value in enumerate(given.sent[:5])), False)
    Decoder().take(given)
    with pytest.raises(Broken, match="not what was sent"):
        Decoder().take(given._replace(sent=wrong))


def test_what_broke_is_told_with_the_command_that_sends_it_again() -> None:
    result = Result("server", 3, range(100, 200), note=lambda _: None)
    result.told(Input(117, "metrics", "protobuf", b"", "cut"), ValueError("x" * 5000))
    result.broke("at the end", ValueError("memory grows"))
    result.log = ["the last line"]
    lines = failures([Result("decoder"), result])
    assert lines[1] == "FAILED: server, input 117 (metrics, cut)"
    assert "  again: make fuzz INPUTS=1 SEED=3 ARGS='--level server --first 117'" in lines
    assert "  again: make fuzz INPUTS=100 SEED=3 ARGS='--level server --first 100'" in lines
    assert lines[-2:] == ["  the collector's log, its last lines:", "    the last line"]
    assert sum(map(len, lines)) < 3_000
