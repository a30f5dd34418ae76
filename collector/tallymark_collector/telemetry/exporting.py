"""The same instruments as a page for Prometheus and, where somebody asks for it, over OTLP to another collector.

OpenTelemetry's readers do both. Nothing here is global: a program that has a collector in it keeps its own provider.
OTLP is sent from a thread of the SDK's; while the other end is away, its metrics are lost and nothing else waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import uuid
from importlib.metadata import version
from typing import Final

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from tallymark_collector.settings import Telemetry
from tallymark_collector.telemetry.instruments import SCOPE, Instruments

logger = logging.getLogger(__name__)

END_SECONDS: Final = 3.0
"""What the last export gets at the end of the collector."""


class Exporting:
    """One process's metrics."""

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        self._registry = CollectorRegistry()
        readers: list[MetricReader] = [PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)]
        if telemetry is not None:
            readers.append(PeriodicExportingMetricReader(_exporter(telemetry)))
        attributes: dict[str, str | int] = {
            "service.name": "tallymark-collector",
            "service.version": version("tallymark"),
            "service.instance.id": str(uuid.uuid4()),
            "process.pid": os.getpid(),
        }
        # What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say goes before ours.
        resource = Resource(attributes).merge(_named())
        self._provider = MeterProvider(readers, resource, shutdown_on_exit=False)
        self.instruments = Instruments(self._provider.get_meter(SCOPE, version("tallymark")))

    def page(self) -> tuple[str, bytes]:
        """Content type and text of all of it in Prometheus's format. Thread-safe, one call at a time."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)

    async def close(self) -> None:
        """Exports once more, and waits no longer for it than it may take."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            try:
                self._provider.shutdown(timeout_millis=END_SECONDS * 1000)
            except Exception:
                logger.exception("the last metrics are not exported")
            with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                loop.call_soon_threadsafe(ended.set)

        # Not a thread of the loop's: the end of the process would wait for it, whatever the other end does.
        threading.Thread(target=shut_down, name="tallymark-telemetry-end", daemon=True).start()
        waiting = asyncio.ensure_future(ended.wait())
        await asyncio.wait({waiting}, timeout=END_SECONDS)
        waiting.cancel()


def _named() -> Resource:
    """What the environment says of this service."""
    found = Resource.create()
    unnamed = str(found.attributes.get("service.name", "")).startswith("unknown_service")
    return Resource({key: value for key, value in found.attributes.items() if not (unnamed and key == "service.name")})


def _exporter(telemetry: Telemetry) -> MetricExporter:
    """What they are sent with; what `endpoint` does not say is said by OTEL_EXPORTER_OTLP_*."""
    if telemetry.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

        return OTLPMetricExporter(endpoint=telemetry.endpoint)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as OverHttp

    return OverHttp(endpoint=telemetry.endpoint)
