from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, Sampler, SamplingResult, TraceIdRatioBased

from tallymark import identify, record, track_usage
from tallymark.assembly import Runtime
from tallymark.recorder import total_of
from tallymark.testing import capture_usage


class Tracing:
    def __init__(self, sampler: Sampler | None = None, limits: SpanLimits | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, span_limits=limits)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")

    def span(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def tracing(fresh: Runtime) -> Iterator[Tracing]:
    identify(account=None, user=None, plan=None)
    return Tracing()


def test_the_current_span_names_account_user_and_quantity(tracing: Tracing) -> None:
    @track_usage("tokens", quantity=len, unit="{token}")
    def handler() -> str:
        return "seven!!"

    with tracing.tracer.start_as_current_span("GET /"):
        identify(account="acme", user="u-1", plan="pro")
        handler()
    assert dict(tracing.span().attributes or {}) == {
        "tallymark.account.id": "acme",
        "user.id": "u-1",
        "tallymark.meter.tokens": 7,
    }


@pytest.mark.parametrize(
    ("amounts", "want"),
    [
        ([1, 2, 3], 6),
        ([0.1] * 10, 1),
        ([0.1, 0.2], 0.3),
        ([Decimal("0.12345678901234567890123")], "0.12345678901234567890123"),
        ([Decimal("0.12345678901234567890123")] * 2, "0.24691357802469135780246"),
        ([2**63 - 1] * 2, str(2**64 - 2)),
        ([0], 0),
    ],
)
def test_quantities_on_one_span_add_up_exactly(tracing: Tracing, amounts: list[float], want: object) -> None:
    with tracing.tracer.start_as_current_span("s"):
        identify(account="acme")
        for amount in amounts:
            record("m", amount)
    got = (tracing.span().attributes or {})["tallymark.meter.m"]
    assert got == want
    assert type(got) is type(want)


def test_two_accounts_in_one_span_are_kept_apart(tracing: Tracing, fresh: Runtime) -> None:
    with tracing.tracer.start_as_current_span("batch"):
        with identify(account="acme", user="u"):
            record("m", 2)
        with identify(account="globex", user="v"):
            record("m", 3)
        record("m", 5)
        with identify(account="acme"):
            record("m", 7)
    span = tracing.span()
    assert dict(span.attributes or {}) == {
        "tallymark.account.id": "acme",
        "user.id": "u",
        "tallymark.meter.m": 9,
    }
    assert [(e.name, dict(e.attributes or {})) for e in span.events] == [
        ("tallymark.usage", {"tallymark.account.id": "globex", "user.id": "v", "tallymark.meter.m": 3}),
        ("tallymark.usage", {"tallymark.meter.m": 5}),
    ]
    assert sum(fresh.recorder.sums().values()) == 17


def test_usage_of_nobody_is_not_given_to_who_comes_after(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("s"):
        record("m", 2)
        identify(account="acme")
        record("m", 3)
        record("n", 4)
    span = tracing.span()
    assert dict(span.attributes or {}) == {"tallymark.meter.m": 2}
    assert [dict(e.attributes or {}) for e in span.events] == [
        {"tallymark.account.id": "acme", "tallymark.meter.m": 3},
        {"tallymark.account.id": "acme", "tallymark.meter.n": 4},
    ]


def test_an_account_that_the_service_wrote_itself_is_respected(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("s", attributes={"tallymark.account.id": "globex"}):
        identify(account="acme")
        record("m", 2)
    assert dict(tracing.span().attributes or {}) == {"tallymark.account.id": "globex"}
    assert len(tracing.span().events) == 1


def test_threads_on_one_span_lose_nothing(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("s"), ThreadPoolExecutor(8) as pool:
        identify(account="acme")
        for future in [pool.submit(copy_context().run, record, "m", 1) for _ in range(400)]:
            future.result()
    assert (tracing.span().attributes or {})["tallymark.meter.m"] == 400


def test_refused_usage_leaves_no_evidence(tracing: Tracing) -> None:
    with tracing.tracer.start_as_current_span("s"):
        record("m", -1)
    assert not tracing.span().attributes


def test_sampling_and_no_tracing_silence_no_usage(tracing: Tracing, fresh: Runtime) -> None:
    record("m")
    with TracerProvider(sampler=ALWAYS_OFF).get_tracer("t").start_as_current_span("s"):
        record("m")
    assert sum(fresh.recorder.sums().values()) == 2


def test_a_span_that_fails_costs_no_usage(fresh: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            raise RuntimeError

    with trace.use_span(Broken(trace.INVALID_SPAN_CONTEXT)):
        record("m", 2)
    assert sum(fresh.recorder.sums().values()) == 2
    assert "a span could not be given its usage" in caplog.text


def counted(fresh: Runtime) -> dict[tuple[str | None, str], int | Decimal]:
    """What the journal says is on spans, by account and meter."""
    running = fresh.recorder._segment
    if running is None:
        return {}
    sums = total_of(running.contents()).items()
    return {(stream.account, stream.meter): amount for stream, amount in sums if stream.evidence}


def shown(tracing: Tracing) -> dict[tuple[str | None, str], int | Decimal]:
    """What the exported spans say."""
    found: dict[tuple[str | None, str], int | Decimal] = {}
    for span in tracing.exporter.get_finished_spans():
        for attributes in (span.attributes or {}, *(event.attributes or {} for event in span.events)):
            account = attributes.get("tallymark.account.id")
            for name, value in attributes.items():
                if name.startswith("tallymark.meter.") and account is not None:
                    key = (str(account), name.removeprefix("tallymark.meter."))
                    found[key] = found.get(key, 0) + Decimal(str(value))
    return found


def test_what_is_on_sampled_spans_is_counted_to_the_unit(fresh: Runtime) -> None:
    tracing = Tracing(TraceIdRatioBased(0.3))
    for n in range(200):
        with tracing.tracer.start_as_current_span("s"):
            with identify(account=f"a{n % 3}"):
                record("m", 0.1)
                record("n", n + 1)
            with identify(account="another"):
                record("m", Decimal("1.25"))
    record("m", 5)
    assert 0 < len(tracing.exporter.get_finished_spans()) < 200
    assert counted(fresh) == shown(tracing)


def test_usage_of_nobody_and_of_nothing_is_not_counted_as_evidence(tracing: Tracing, fresh: Runtime) -> None:
    with tracing.tracer.start_as_current_span("s"):
        record("m", 2)
        identify(account="acme")
        record("m", 0)
    assert counted(fresh) == {}


def test_a_span_that_is_recorded_but_not_exported_is_not_counted(fresh: Runtime) -> None:
    class RecordOnly(Sampler):
        def should_sample(self, *args: object, **kwargs: object) -> SamplingResult:
            return SamplingResult(Decision.RECORD_ONLY)

        def get_description(self) -> str:
            return "record only"

    tracing = Tracing(RecordOnly())
    with tracing.tracer.start_as_current_span("s") as span, identify(account="acme"):
        record("m", 2)
        assert span.is_recording()
    assert tracing.exporter.get_finished_spans() == ()
    assert counted(fresh) == {}


def test_a_span_that_ends_while_it_is_written_to_is_not_counted(tracing: Tracing, fresh: Runtime) -> None:
    span = tracing.tracer.start_span("s")

    class Ending(trace.NonRecordingSpan):
        attributes = span.attributes  # type: ignore[attr-defined]

        def is_recording(self) -> bool:
            return True

        def set_attribute(self, key: str, value: object) -> None:
            pass

    with trace.use_span(Ending(span.get_span_context())), identify(account="acme"):
        record("m", 2)
    assert counted(fresh) == {}
    assert sum(fresh.recorder.sums().values()) == 2


def test_a_value_that_the_limits_of_spans_cut_short_is_not_counted(fresh: Runtime) -> None:
    tracing = Tracing(limits=SpanLimits(max_attribute_length=8))
    with tracing.tracer.start_as_current_span("s"), identify(account="acme"):
        record("m", Decimal("0.12345678901234567890123"))
    assert counted(fresh) == {}


@pytest.mark.parametrize("most", [None, 5])
def test_accounts_that_a_span_has_no_room_for_are_not_counted(fresh: Runtime, most: int | None) -> None:
    tracing = Tracing(limits=SpanLimits(max_events=most))
    with tracing.tracer.start_as_current_span("batch"):
        for number in range(200):
            with identify(account=f"account-{number}"):
                record("m", 1)
    assert counted(fresh) == shown(tracing)
    assert len(shown(tracing)) == 1 + (most or 128)
    assert sum(fresh.recorder.sums().values()) == 200


def test_what_is_on_spans_is_in_nothing_that_users_see(tracing: Tracing) -> None:
    with capture_usage() as usage, tracing.tracer.start_as_current_span("s"), identify(account="acme"):
        record("m", 2)
    assert [(one.meter, one.quantity) for one in usage] == [("m", 2)]
    assert usage.total("m") == 2


def test_undelivered_usage_is_reported_without_it(tracing: Tracing, fresh: Runtime) -> None:
    with tracing.tracer.start_as_current_span("s"), identify(account="acme"):
        record("m", 2)
    assert fresh.undelivered() == {"m": 2}
