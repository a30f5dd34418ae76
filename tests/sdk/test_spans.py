from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from tallymark import identify, record, track_usage
from tallymark.runtime import Runtime


class Tracing:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
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
