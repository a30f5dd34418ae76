"""Gauges and UpDownCounters of OpenTelemetry's own SDK, over gRPC to a collector's process, to an invoice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from tests.collector.cli.conftest import program
from tests.support.collector import running

ACME, GLOBEX = ({"tallymark.account.id": account} for account in ("acme", "globex"))
PLANS = """\
currency: EUR
meters:
  seats.peak:    {unit: "{seat}", aggregation: max}
  seats:         {unit: "{seat}", aggregation: latest}
  connections:   {unit: "{connection}", aggregation: integral, stale_after: 2h}
  requests:      {unit: "{request}"}
plans:
  pro:
    charges:
      - {meter: seats.peak, unit_price: 10}
      - {meter: seats, unit_price: 1}
      - {meter: connections, unit_price: "0.01"}
      - {meter: requests, unit_price: 1}
accounts:
"""
SEATS = [3, 7, 5]
CONNECTIONS = [(4, 1), (-1, 0), (2, 6)]
"""What acme's and globex's count changes by before each export."""


class Recording(OTLPMetricExporter):
    """Sends as usual, and notes what was sent: (metric, account) to (microsecond, value)."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.sent: dict[tuple[str, str], list[tuple[int, Fraction]]] = defaultdict(list)

    def export(self, metrics_data: MetricsData, *more: Any, **named: Any) -> MetricExportResult:
        for resource in metrics_data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        account = str((point.attributes or {})["tallymark.account.id"])
                        value = Fraction(str(getattr(point, "value", 0)))
                        self.sent[metric.name, account].append((point.time_unix_nano // 1000, value))
        result = super().export(metrics_data, *more, **named)
        assert result is MetricExportResult.SUCCESS
        return result


def integral(told: list[tuple[int, Fraction]], stale_seconds: int) -> Decimal:
    """Hours times what it stood at, each sample until the next, the last for as long as it holds."""
    stops = [*told, (told[-1][0] + stale_seconds * 10**6, Fraction(0))]
    micros = sum((value * (then - now) for (now, value), (then, _) in pairwise(stops)), Fraction(0))
    hours = micros / (3600 * 10**6)
    return Decimal(int(hours * 10**18 + Fraction(1, 2))).scaleb(-18)


@pytest.mark.parametrize("preference", ["cumulative", "delta"])
def test_levels_of_opentelemetrys_sdk_are_billed(
    dsn: str, tmp_path: Path, preference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the preference `delta`, too, an UpDownCounter is sent as running totals: OpenTelemetry says so."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
    # A year that neither begins nor ends near the day on which this runs.
    today = date.today()  # noqa: DTZ011
    month = (today.month + 5) % 12 + 1
    file = tmp_path / "plans.yaml"
    terms = f"{{plan: pro, since: {today - timedelta(days=40)}, cycle: yearly, anchor_month: {month}}}"
    file.write_text(PLANS + "".join(f"  {account}: {terms}\n" for account in ("acme", "globex")))
    told = iter(SEATS)
    now = 0

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        yield Observation(now, ACME)
        yield Observation(2 * now, GLOBEX)

    with running(dsn) as collector:
        exporter = Recording(endpoint=f"http://127.0.0.1:{collector.port}", insecure=True, timeout=60)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
        resource = Resource.create({"service.name": "shop", "service.instance.id": "one"})
        provider = MeterProvider([reader], resource)
        otel_meter = provider.get_meter("billing")
        for name in ("seats", "seats.peak"):
            otel_meter.create_observable_gauge(name, [observe], unit="{seat}")
        connections = otel_meter.create_up_down_counter("connections", unit="{connection}")
        requests = otel_meter.create_counter("requests", unit="{request}")
        for acme, globex in CONNECTIONS:
            now = next(told)
            connections.add(acme, ACME)
            connections.add(globex, GLOBEX)
            requests.add(1, ACME)
            assert reader.force_flush(60_000)
        reader.shutdown = lambda *_, **__: None  # type: ignore[method-assign]  # it would collect once more
        exporter.shutdown()

    assert program("plans", "apply", str(file), "--database", dsn).returncode == 0
    shown = program("invoice", "--database", dsn, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    invoices = {each["account"]: each for each in json.loads(shown.stdout)}
    for account, factor in (("acme", 1), ("globex", 2)):
        stood = exporter.sent["connections", account]
        assert [value for _, value in stood] == ([4, 3, 5] if account == "acme" else [1, 1, 7])
        assert {line["meter"]: Decimal(line["quantity"]) for line in invoices[account]["lines"]} == {
            "seats.peak": 7 * factor,
            "seats": 5 * factor,
            "connections": integral(stood, 2 * 3600),
            "requests": 3 if account == "acme" else 0,
        }
        units = [(line["meter"], line["unit"], line["aggregation"]) for line in invoices[account]["lines"]]
        assert ("connections", "{connection}.h", "integral") in units
        assert invoices[account]["unpriced"] == invoices[account]["remarks"] == []
    usage = program("usage", "--database", dsn, "--json", "--account", "acme")
    assert [(row["meter"], row["aggregation"], row["points"]) for row in json.loads(usage.stdout)] == [
        ("connections", "integral", 3),
        ("requests", "sum", 3),
        ("seats", "latest", 3),
        ("seats.peak", "max", 3),
    ]
