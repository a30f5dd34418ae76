"""Carries usage from the recorder through the outbox to the collector, in a thread of its own.

Each interval: cut the recorder, put the batches into the outbox, send them. A batch leaves the outbox when the
exporter has acknowledged it and is sent again, unchanged, until then. Nothing of gRPC exists before there is
something to send, so that servers which fork their workers do not fork a channel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tallymark.batches import batches_of
from tallymark.outbox import Batch, Outbox
from tallymark.recorder import MAX_STREAMS, Recorder
from tallymark.reporting import Reporter

FIRST_BACKOFF_S: Final = 0.5
MAX_DRAIN_CUTS: Final = 32
"""Cuts that one flush makes for remainders; a sum that fits int64 or 17 digits needs one, any other a few."""


class Client(Protocol):
    """The part of OpenTelemetry's OTLPMetricExporter that is used."""

    def export(self, metrics_data: MetricsData, /) -> MetricExportResult: ...

    def shutdown(self, /) -> None: ...


class UsageExporter:
    """The thread and its timetable. `connect` is called in the thread, when there is something to send."""

    def __init__(
        self,
        recorder: Recorder,
        outbox: Outbox,
        *,
        connect: Callable[[], Client],
        resource: Resource,
        scope: InstrumentationScope,
        interval_s: float,
        reporter: Reporter,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._recorder = recorder
        self._outbox = outbox
        self._connect = connect
        self._scope = scope
        self._interval_s = interval_s
        self._reporter = reporter
        self._clock_ns = clock_ns
        self._client: Client | None = None
        self._resource = resource
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        # Flushes are numbered. All three are guarded by the condition.
        self._changed = threading.Condition()
        self._requested = 0
        self._confirmed = 0
        self._stopping = False

    def start(self) -> bool:
        """Start the thread if it does not run. False when it cannot: the interpreter is about to end."""
        with self._starting:
            if self._thread is not None and self._thread.is_alive():
                return True
            thread = threading.Thread(target=self._run, name="tallymark-exporter", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
            return True

    def flush(self, timeout_s: float) -> bool:
        """Send now, and wait. True when everything recorded before the call is acknowledged, False after
        `timeout_s` seconds without that; it then goes on being tried."""
        if self._thread is None and not self._recorder and not len(self._outbox):
            return True
        if not self.start():
            return self._round(drain=True)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._stopping:
                return not self._recorder and not len(self._outbox)
            self._requested += 1
            ticket = self._requested
            self._changed.notify_all()
            while self._confirmed < ticket:
                left = deadline - time.monotonic()
                if left <= 0 or self._stopping:
                    return False
                self._changed.wait(left)
            return True

    def shutdown(self, timeout_s: float) -> bool:
        """Flush as above, then end the thread and close the channel. Again: nothing happens."""
        deadline = time.monotonic() + timeout_s
        delivered = self.flush(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._client is not None:
            self._client.shutdown()  # also wakes an export that waits for its next attempt
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.1, deadline - time.monotonic()))
        return delivered

    def _run(self) -> None:
        # Instrumentation of gRPC must neither trace these calls nor count them as the service's own.
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        failures = 0
        attempted = 0
        due = time.monotonic() + self._interval_s
        while True:
            with self._changed:
                while not self._stopping and self._requested == attempted and (left := due - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._stopping:
                    return
                attempted = self._requested
                wanted = attempted > self._confirmed
            done = self._round(drain=wanted)
            with self._changed:
                if done and wanted:
                    self._confirmed = attempted
                    self._changed.notify_all()
            failures = 0 if done else failures + 1
            pause = self._interval_s if done else min(self._interval_s, FIRST_BACKOFF_S * 2 ** min(failures - 1, 16))
            due = time.monotonic() + pause

    def _round(self, drain: bool) -> bool:
        """Cut and send. True when all that was recorded before is acknowledged; a remainder too, with `drain`."""
        try:
            for _ in range(MAX_DRAIN_CUTS):
                cut = self._cut()
                if not self._send():
                    return False
                if cut and not (drain and self._recorder.has_remainders):
                    return True
        except Exception as error:
            self._reporter.error("export", "usage could not be exported now and is kept: %r", error, exc_info=error)
        return False

    def _cut(self) -> bool:
        if self._outbox.full:
            self._reporter.warning(
                "outbox", "the outbox is full: usage is kept in a longer interval until the collector answers"
            )
            return False
        cut = self._recorder.cut(self._clock_ns())
        if len(cut.values) >= MAX_STREAMS:
            self._reporter.warning(
                "streams", "%d streams in one interval: further ones were counted without dimensions", len(cut.values)
            )
        try:
            batches = tuple(batches_of(cut, self._resource, self._scope))
        except BaseException:
            self._recorder.take_back(cut)
            raise
        for batch in batches:
            self._outbox.put(batch)
        return True

    def _send(self) -> bool:
        """Send until the outbox is empty: True; or until a batch fails: False, and it has gone to the end."""
        while (batch := self._outbox.head()) is not None:
            if self._stopping or not self._acknowledged(batch):
                self._outbox.postpone(batch)
                return False
            self._outbox.acknowledge(batch)
        return True

    def _acknowledged(self, batch: Batch) -> bool:
        if self._client is None:
            self._client = self._connect()
        try:
            return self._client.export(batch.data) is MetricExportResult.SUCCESS
        except Exception as error:
            self._reporter.error(
                "export", "a batch of usage could not be exported now and is kept: %r", error, exc_info=error
            )
            return False
