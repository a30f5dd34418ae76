"""The process's one runtime, and the only module with global state.

A `Runtime` holds what records and what sends. The recorder and the outbox live as long as the process: usage recorded
before `configure()`, or after `shutdown()`, waits in them. A forked child starts with empty ones of its own.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tallymark import conventions
from tallymark.errors import SettingsError
from tallymark.exporting import Client, UsageExporter
from tallymark.meters import Meters
from tallymark.outbox import Outbox
from tallymark.quantities import Exact, add
from tallymark.recorder import Recorder
from tallymark.reporting import Reporter
from tallymark.resource import make_resource, of_forked_child
from tallymark.settings import Settings, disabled_by, make_settings
from tallymark.spans import SpanEvidence

VERSION: Final = importlib.metadata.version("tallymark")


class Runtime:
    """Everything that one process meters with. Other modules are given it, or ask `current()`."""

    def __init__(self, meters: Meters | None = None) -> None:
        self.meters = meters or Meters()
        self.settings: Settings | None = None
        self.enabled = not disabled_by()
        self.resource: Resource | None = None
        self._new_parts()

    def _new_parts(self) -> None:
        self.recorder = Recorder(time.time_ns(), on_first=self._on_first_usage)
        self.outbox = Outbox()
        self.evidence = SpanEvidence()
        self.reporter = Reporter()
        self.exporter: UsageExporter | None = None
        self._lock = threading.Lock()

    def configure(self, settings: Settings) -> None:
        """Start sending. Raises SettingsError when other settings are in force."""
        with self._lock:
            if self.settings is not None:
                if self.settings != settings:
                    raise SettingsError(
                        f"already configured with {self.settings}; call tallymark.shutdown() before {settings}"
                    )
                return
            if not settings.disabled:
                _client_class()
                self.resource = make_resource(dict(settings.resource))
                self.exporter = self._make_exporter(settings, self.resource)
            self.settings = settings
            self.enabled = not settings.disabled
        if self.exporter is not None and (self.recorder or len(self.outbox)):
            self.exporter.start()

    def flush(self, timeout_s: float) -> bool:
        """True when everything recorded before the call is acknowledged."""
        if not self.enabled:
            return True
        if self.exporter is None:
            return not self.recorder and not len(self.outbox)
        return self.exporter.flush(timeout_s)

    def shutdown(self, timeout_s: float | None) -> bool:
        """Flush and stop sending; what could not be delivered stays for a later `configure()`."""
        with self._lock:
            exporter, settings = self.exporter, self.settings
            self.exporter = self.settings = None
        if exporter is None or settings is None:
            return self.flush(0)
        return exporter.shutdown(settings.shutdown_timeout_s if timeout_s is None else timeout_s)

    def undelivered(self) -> dict[str, Exact]:
        """Quantity by meter that no collector has acknowledged."""
        amounts: dict[str, Exact] = {}
        for batch in self.outbox.batches():
            for meter, amount in batch.amounts:
                amounts[meter] = add(amounts.get(meter, 0), amount)
        for stream, amount in self.recorder.sums().items():
            amounts[stream[0].name] = add(amounts.get(stream[0].name, 0), amount)
        return {meter: amount for meter, amount in amounts.items() if amount}

    def start_over_in_child(self) -> None:
        """After a fork: drop what the parent counted and will send, with every lock that it may have held."""
        # The parent's gRPC channel must not be closed, or collected, by a process that has none of its threads.
        _inherited.append((self.exporter, self.outbox, self.recorder))
        self.meters.new_lock()
        self._new_parts()
        if self.resource is not None:
            self.resource = of_forked_child(self.resource)
            if self.settings is not None and self.enabled:
                self.exporter = self._make_exporter(self.settings, self.resource)

    def _make_exporter(self, settings: Settings, resource: Resource) -> UsageExporter:
        return UsageExporter(
            self.recorder,
            self.outbox,
            connect=lambda: _connect(settings),
            resource=resource,
            scope=InstrumentationScope(conventions.SCOPE_NAME, VERSION),
            interval_s=settings.interval_s,
            reporter=self.reporter,
        )

    def _on_first_usage(self) -> None:
        exporter = self.exporter
        if exporter is not None:
            exporter.start()
        elif self.settings is None:
            self.reporter.warning(
                "unconfigured", "usage is recorded but tallymark.configure() has not been called: it is kept until then"
            )


def _client_class() -> Callable[..., Client]:
    """OpenTelemetry's exporter, with which gRPC is imported: in `configure()`, not in the exporter's thread, because a
    child forked during that import could never finish it, and an interpreter that is ending may not begin it."""
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter


def _connect(settings: Settings) -> Client:
    return _client_class()(
        endpoint=settings.endpoint,
        insecure=settings.insecure,
        headers=settings.headers or None,
        timeout=settings.timeout_s,
    )


_inherited: list[object] = []
_runtimes: list[Runtime] = [Runtime()]
_current: Runtime = _runtimes[0]


def current() -> Runtime:
    """The runtime that usage goes to."""
    return _current


@contextmanager
def using(runtime: Runtime) -> Iterator[Runtime]:
    """For tests: usage of the whole process goes to `runtime` inside the block."""
    global _current
    _runtimes.append(runtime)
    _current = runtime
    try:
        yield runtime
    finally:
        _runtimes.remove(runtime)
        _current = _runtimes[-1]


def configure(
    *,
    endpoint: str | None = None,
    headers: Mapping[str, str] | None = None,
    insecure: bool | None = None,
    timeout: float | None = None,
    interval: float | None = None,
    shutdown_timeout: float | None = None,
    resource: Mapping[str, str] | None = None,
    disabled: bool | None = None,
) -> None:
    """Say where usage goes, and start sending what was recorded so far.

    Every argument may be left out; then the variable counts, then OpenTelemetry's own.

    - `endpoint` (TALLYMARK_ENDPOINT): the collector, as in "http://localhost:4317".
    - `headers` (TALLYMARK_HEADERS, name=value,name=value): sent with every export; the tenant's credential.
    - `insecure` (TALLYMARK_INSECURE): no TLS for an endpoint without a scheme.
    - `timeout` (TALLYMARK_TIMEOUT): seconds for one export with its retries.
    - `interval` (TALLYMARK_EXPORT_INTERVAL, OTEL_METRIC_EXPORT_INTERVAL in ms): seconds between exports, 10.
    - `shutdown_timeout` (TALLYMARK_SHUTDOWN_TIMEOUT): seconds that the end of the process waits for delivery, 10.
    - `resource`: attributes of this process, over OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.
    - `disabled` (TALLYMARK_DISABLED): record nothing at all. OTEL_SDK_DISABLED does not silence usage.

    The same settings again do nothing. Raises SettingsError when other ones are in force (call `shutdown()` first:
    nothing recorded is lost by it), and when settings cannot work, with all the problems in one message.
    """
    settings = make_settings(
        endpoint=endpoint,
        headers=headers,
        insecure=insecure,
        timeout=timeout,
        interval=interval,
        shutdown_timeout=shutdown_timeout,
        resource=resource,
        disabled=disabled,
    )
    _current.configure(settings)


def flush(timeout: float = 10.0) -> bool:
    """Send usage now and wait for it, at most `timeout` seconds.

    True only when everything recorded before the call has been acknowledged by the collector. What has not is kept
    and sent later. It blocks: on an event loop, call it by `asyncio.to_thread`.
    """
    return _current.flush(timeout)


def shutdown(timeout: float | None = None) -> bool:
    """Flush, then stop sending; True when everything recorded before the call has been acknowledged.

    Waits at most `timeout` seconds (the `shutdown_timeout` of `configure()` when left out). It is called at the end of
    the process by itself. Usage recorded afterwards, or not delivered, waits for another `configure()`.
    """
    return _current.shutdown(timeout)


def _after_fork_in_child() -> None:
    for runtime in _runtimes:
        runtime.start_over_in_child()


def _at_exit() -> None:
    runtime = _current
    if runtime.shutdown(None):
        return
    lost = runtime.undelivered()
    if lost:
        runtime.reporter.error(
            "lost",
            "the process ends with usage that no collector has acknowledged: %s",
            ", ".join(f"{meter}={amount}" for meter, amount in sorted(lost.items())),
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
