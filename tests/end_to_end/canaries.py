"""OTLP requests with a canary in each place where a client can put a credential, or where anything may stand that is
never billed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark import conventions
from tests.support.usage import SECOND, key_values

WORD = "kanarien"
"""What all canaries begin with: it stands nowhere else."""
_DAY = 86_400 * SECOND


class Canaries:
    """Makes secrets that can be told apart."""

    def __init__(self) -> None:
        self._numbers = count()
        self.places: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        """A new secret."""
        canary = f"{WORD}{next(self._numbers)}v0gel"
        self.places[canary] = place
        return canary

    def attributes(self, place: str) -> dict[str, Any]:
        """Attributes, each with a canary in its value."""

        def new(name: str) -> str:
            return self(f"{place}: {name}")

        return {
            "http.request.header.authorization": f"Bearer {new('authorization')}",
            "http.request.header.cookie": f"session={new('cookie')}",
            "http.response.header.set-cookie": new("set-cookie"),
            "http.request.header.x_api_key": new("x_api_key"),
            "rpc.grpc.request.metadata.authorization": new("metadata"),
            "url.full": f"https://{new('user')}:{new('password')}@shop.example/a?b=c&sig={new('sig')}",
            "url.query": f"api_key={new('api_key')}&AWSAccessKeyId={new('AWSAccessKeyId')}",
            "http.url": f"https://{new('only user')}@shop.example/a?X-Goog-Signature={new('X-Goog-Signature')}",
            "http.target": f"/a?token={new('target')}#access_token={new('fragment')}",
            "http.request.header.referer": f"https://shop.example/?password={new('referer')}",
            "db.connection_string": f"Server=a;Password={new('connection string')}",
            "process.command_args": new("arguments"),
            "app.client_secret": new("client_secret"),
            "exception.message": f"GET https://a.example/?key={new('message')} failed",
            "bytes.password": new("bytes").encode(),
            "otp": new("one-time password"),
            "private_key_pem": new("private_key_pem"),
            "aws_access_key_id": new("aws_access_key_id"),
            "http.request.header.x-auth": new("x-auth"),
            "note": f"sent Authorization: Bearer {new('authorization in a text')} to it",
            "exception.stacktrace": f"login(password={new('assigned')})",
            "body": f'{{"a": 1, "password": "{new("JSON")}"}}',
            "url.template": f"https://shop.example/cb?code={new('code')}&otp={new('otp')}",
        }

    def fill(self, place: str, attributes: Any) -> None:
        """Attributes of a message, of which some are nested."""
        attributes.extend(key_values(self.attributes(place)))
        header = attributes.add(key="http.request.header.proxy-authorization").value.array_value.values
        for part in ("first", "second"):
            header.add().string_value = self(f"{place}: array, {part}")
        inner = attributes.add(key="request").value.kvlist_value.values
        inner.extend(key_values({"password": self(f"{place}: map")}))
        several = attributes.add(key="urls").value.array_value.values
        several.add().string_value = f"https://a.example/?secret={self(f'{place}: urls')}"


def metrics(canaries: Canaries, now_ns: int, producer: str) -> Iterator[tuple[str, ExportMetricsServiceRequest]]:
    """(what becomes of it, request): stored, and refused for each reason that a single request can have."""
    for fate in (
        "stored",
        "repeated otherwise",
        "no account",
        "not finite",
        "ahead",
        "negative",
        "unreadable",
        "bad control",
        "gauge",
        "histogram",
        "exponential histogram",
        "summary",
        "by a file of meters",
    ):
        yield fate, _metrics(canaries, fate, now_ns, producer)


def _metrics(canaries: Canaries, fate: str, now_ns: int, producer: str) -> ExportMetricsServiceRequest:
    message = ExportMetricsServiceRequest()
    resource = message.resource_metrics.add(schema_url=f"https://a.example/{canaries(f'{fate}: schema')}")
    resource.resource.attributes.extend(key_values({"service.name": "shop", "service.instance.id": producer}))
    canaries.fill(f"{fate}: resource", resource.resource.attributes)
    within = resource.scope_metrics.add(schema_url=f"https://a.example/{canaries(f'{fate}: schema')}")
    within.scope.name = "tallymark.control" if fate == "bad control" else "tallymark"
    canaries.fill(f"{fate}: scope", within.scope.attributes)
    for value in (1, 2) if fate == "repeated otherwise" else (1,):
        metric = within.metrics.add(unit="{request}", description=canaries(f"{fate}: description"))
        metric.name = {"bad control": "tallymark.control.total", "by a file of meters": "gateway.duration"}.get(
            fate, f"calls.{fate.replace(' ', '_')}"
        )
        canaries.fill(f"{fate}: metadata", metric.metadata)
        kinds = {"gauge": "gauge", "histogram": "histogram", "summary": "summary", "by a file of meters": "histogram"}
        data = getattr(metric, "exponential_histogram" if fate.startswith("exp") else kinds.get(fate, "sum"))
        if fate not in ("gauge", "summary"):
            data.aggregation_temporality = 1
        if metric.WhichOneof("data") == "sum":
            data.is_monotonic = True
        ahead = _DAY if fate in ("ahead", "by a file of meters") else 0
        point = data.data_points.add(start_time_unix_nano=now_ns - SECOND, time_unix_nano=now_ns + ahead)
        _fill_point(canaries, fate, point, value)
    return message


def _fill_point(canaries: Canaries, fate: str, point: Any, value: int) -> None:
    kind = point.DESCRIPTOR.name
    if kind == "NumberDataPoint":
        if fate == "not finite":
            point.as_double = float("nan")
        else:
            point.as_int = -1 if fate == "negative" else value
    else:
        point.count = value
    if fate != "no account":
        point.attributes.extend(key_values({"tallymark.account.id": "acme"}))
    if fate == "repeated otherwise":
        # The same stream: the same secrets, of which only the first are looked for at this place.
        point.attributes.extend(key_values({"app.client_secret": f"{WORD}twicev0gel"}))
        canaries.places[f"{WORD}twicev0gel"] = fate
    else:
        canaries.fill(f"{fate}: point", point.attributes)
    if fate == "unreadable":
        deep = point.attributes.add(key="http.request.header.authorization").value
        for _ in range(20):
            deep = deep.array_value.values.add()
        deep.string_value = canaries("unreadable: deep")
    if kind != "SummaryDataPoint":
        exemplar = point.exemplars.add(time_unix_nano=1, as_int=1, trace_id=b"t" * 16, span_id=b"s" * 8)
        canaries.fill(f"{fate}: exemplar", exemplar.filtered_attributes)
        exemplar.filtered_attributes.extend(key_values({"note": canaries(f"{fate}: exemplar's note")}))


def traces(canaries: Canaries, now_ns: int, producer: str) -> Iterator[tuple[str, ExportTraceServiceRequest]]:
    """The same of spans."""
    for number, fate in enumerate(
        ("evidence", "no account", "ahead", "by a file of meters", "metered, ahead", "passed")
    ):
        message = ExportTraceServiceRequest()
        resource = message.resource_spans.add(schema_url=f"https://a.example/{canaries(f'{fate}: schema')}")
        resource.resource.attributes.extend(key_values({"service.name": "shop", "service.instance.id": producer}))
        canaries.fill(f"{fate}: resource", resource.resource.attributes)
        within = resource.scope_spans.add()
        within.scope.name = "shop"
        canaries.fill(f"{fate}: scope", within.scope.attributes)
        span = within.spans.add(trace_id=producer.encode().ljust(16, b"-")[-16:], span_id=bytes([number] * 8))
        metered = "meter" in fate
        span.name = f"{'gateway' if metered else 'GET'} /a?api_key={canaries(f'{fate}: name')}"
        ahead = _DAY if "ahead" in fate else 0
        span.start_time_unix_nano, span.end_time_unix_nano = now_ns - SECOND, now_ns + ahead
        if not metered and fate != "passed":
            span.attributes.extend(key_values({"tallymark.meter.calls": 1}))
        if fate != "no account":
            user = f"https://a.example/?token={canaries(f'{fate}: user')}"
            span.attributes.extend(key_values({"tallymark.account.id": "acme", conventions.USER: user}))
        canaries.fill(f"{fate}: span", span.attributes)
        usage = span.events.add(name="tallymark.usage")
        usage.attributes.extend(key_values({"tallymark.account.id": "acme", "tallymark.meter.tokens": 2}))
        canaries.fill(f"{fate}: usage event", usage.attributes)
        event = span.events.add(name=canaries(f"{fate}: event's name"))
        canaries.fill(f"{fate}: event", event.attributes)
        event.attributes.extend(key_values({"note": canaries(f"{fate}: event's note")}))
        link = span.links.add(trace_id=b"u" * 16, span_id=b"v" * 8, trace_state=f"a={canaries(f'{fate}: link')}")
        canaries.fill(f"{fate}: link", link.attributes)
        span.status.code = 2
        span.status.message = canaries(f"{fate}: status")
        span.trace_state = f"vendor={canaries(f'{fate}: trace state')}"
        yield fate, message


def logs(canaries: Canaries, now_ns: int) -> ExportLogsServiceRequest:
    """A record that nobody bills."""
    message = ExportLogsServiceRequest()
    resource = message.resource_logs.add()
    canaries.fill("logs: resource", resource.resource.attributes)
    record = resource.scope_logs.add().log_records.add(time_unix_nano=now_ns)
    record.body.string_value = canaries("logs: body")
    canaries.fill("logs: record", record.attributes)
    return message
