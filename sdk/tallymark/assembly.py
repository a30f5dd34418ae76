"""What one process meters with, put together: the recorder, what it writes to, what sends, and their beginning and end.

Before `configure()` usage is in memory; from then on it is in a folder on the disk (`tallymark.journal`), also after
`shutdown()`. A forked child starts with nothing, and with its own folder at its first usage.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import re
import threading
import time
from pathlib import Path
from typing import Final

from opentelemetry.sdk.resources import Resource

from tallymark import conventions
from tallymark.batches import producer_record
from tallymark.calls import LateCalls
from tallymark.dead_letters import DeadLetters
from tallymark.delivery import Delivery
from tallymark.endpoint import Endpoint, endpoint_of
from tallymark.errors import SettingsError
from tallymark.exporting import UsageExporter
from tallymark.folder import HAS_LOCKS
from tallymark.journal import Journal
from tallymark.merging import Merger
from tallymark.meters import Meters
from tallymark.mirror import Instruments, Mirror
from tallymark.outbox import Outbox
from tallymark.packing import Packer
from tallymark.quantities import Exact, add
from tallymark.recorder import Recorder
from tallymark.recovery import Recovery
from tallymark.reporting import Reporter
from tallymark.resource import make_resource, of_forked_child
from tallymark.sending import Client, GrpcClient
from tallymark.settings import Settings, default_state_dir, disabled_by
from tallymark.spans import SpanEvidence
from tallymark.state import State, StateInstruments
from tallymark.streams import SeriesCache

VERSION: Final = importlib.metadata.version("tallymark")


class Runtime:
    """Everything that one process meters with. Other modules are given it, or ask `tallymark.runtime.current()`."""

    def __init__(
        self,
        instruments: Instruments,
        meters: Meters | None = None,
        state_instruments: StateInstruments | None = None,
    ) -> None:
        """Instruments are the process's: OpenTelemetry lets none go again."""
        self.meters = meters or Meters()
        self._instruments = instruments
        self._state_instruments = state_instruments
        self._inherited: list[object] = []
        self.settings: Settings | None = None
        self.gives_way = False
        """Whether the settings in force are the environment's alone, and the service's own `configure()` replaces
        them: an instrumentation has read them before the service's first line."""
        self.enabled = not disabled_by()
        self.resource: Resource | None = None
        self._new_parts()

    def _new_parts(self) -> None:
        self.series = SeriesCache()
        self.reporter = Reporter()
        self.outbox = Outbox()
        self.letters = DeadLetters(self.reporter)
        self.packer = Packer(self.outbox, self.reporter)
        self.journal = Journal(self.outbox, self.packer, self.reporter)
        self.merger = Merger(self.outbox, self.reporter)
        self.recovery = Recovery(self.outbox, self.packer, self.merger, self.reporter)
        self.recorder = Recorder(
            time.time_ns(), self.journal.new_segment, self._on_first_usage, self.packer.not_durable
        )
        self.evidence = SpanEvidence(self.recorder)
        self.late = LateCalls()
        self.mirror: Mirror = Mirror(self.recorder, self._instruments, self.reporter)
        self.exporter: UsageExporter | None = None
        self._unfinished: tuple[float, tuple[object, ...]] | None = None
        """Of a `finish()` that has not delivered everything: seconds that it left of its time, and what it left."""
        self._ended: UsageExporter | None = None
        """The one that was shut down last: what it had connected may be ending yet."""
        self._lock = threading.RLock()
        # What a signal's handler asks for in the midst of `configure()`, in the same thread, waits for its end.
        self._configuring = 0
        """The thread that configures."""
        self._shutdown_asked: tuple[float | None] | None = None

    def configure(self, settings: Settings) -> None:
        """Start sending. Raises SettingsError when other settings are in force."""
        self._unfinished = None
        gives_way, self.gives_way = self.gives_way, False
        if gives_way and self.settings not in (None, settings):
            self.shutdown(None)
        with self._lock:
            if self._is_configuring():
                raise SettingsError("a signal's handler has called configure() in the midst of another configure()")
            self._configuring = threading.get_ident()
            try:
                self._configure(settings)
            finally:
                self._configuring = 0
                asked, self._shutdown_asked = self._shutdown_asked, None
                if asked is not None:
                    self.shutdown(*asked)

    def _configure(self, settings: Settings) -> None:
        if self.settings is not None:
            if self.settings != settings:
                raise SettingsError(
                    f"already configured with {self.settings}; call tallymark.shutdown() before {settings}"
                )
            return
        if not settings.disabled:
            _refuse_subinterpreter()
            _import_grpc()
            self.resource = make_resource(dict(settings.resource))
            self._show(settings)
            self._open(settings, self.resource)
        self.settings = settings
        self.enabled = not settings.disabled
        if self.exporter is None:
            return
        if self.recorder or len(self.outbox):
            self.exporter.start()
        elif self.recovery.is_needed(self.letters.place, self.journal.where()):
            self.exporter.start(recover=False)
        if self.letters.place is not None:
            self.recovery.tell_of_other_credentials(self.letters.place)

    def _is_configuring(self) -> bool:
        """True for a signal's handler that has interrupted `configure()`."""
        return self._configuring == threading.get_ident()

    def flush(self, timeout_s: float) -> bool:
        """True when everything recorded before the call is acknowledged."""
        if not self.enabled:
            return True
        if self.exporter is None or self._is_configuring():
            return not self.recorder and not len(self.outbox)
        return self.exporter.flush(timeout_s)

    def shutdown(self, timeout_s: float | None) -> bool:
        """Flush and stop sending; what could not be delivered stays for a later `configure()`. For a signal's handler
        that has interrupted `configure()`, that does it at its end."""
        with self._lock:
            if self._is_configuring():
                self._shutdown_asked = (timeout_s,)
                return self.flush(0)
            exporter, settings = self.exporter, self.settings
            self.exporter = self.settings = self._unfinished = None
            self._ended = exporter or self._ended
        if exporter is None:
            return self.flush(0)
        self.late.settle(0)
        if timeout_s is None:
            timeout_s = 0.0 if settings is None else settings.shutdown_timeout_s
        delivered = exporter.shutdown(timeout_s)
        self.recovery.release()
        self.journal.close(self.recorder)
        return delivered

    def finish(self) -> bool:
        """Flush, at most for the `shutdown_timeout`, as if the process ended here; what is recorded afterwards is kept
        and sent as ever."""
        exporter, settings = self.exporter, self.settings
        if exporter is None or settings is None:
            return self.flush(0)
        self.late.settle(0)
        deadline = time.monotonic() + settings.shutdown_timeout_s
        delivered = exporter.finish(settings.shutdown_timeout_s)
        self._unfinished = None if delivered else (max(deadline - time.monotonic(), 0.0), self._left_behind())
        return delivered

    def end(self) -> bool:
        """`shutdown`, at the process's end: within what a `finish` has left of its time where nothing has changed
        since. Whoever waits for the process waits for both of them, and the collector still does not answer."""
        self.late.settle(0)
        unfinished = self._unfinished
        if unfinished is None or unfinished[1] != self._left_behind():
            return self.shutdown(None)
        return self.shutdown(unfinished[0])

    def _left_behind(self) -> tuple[object, ...]:
        """Other where something has been recorded, or acknowledged, in the meantime."""
        return self.recorder.since_ns, self.recorder.sums(), len(self.outbox), self.outbox.size

    def undelivered(self) -> dict[str, Exact]:
        """Quantity by meter that no collector has acknowledged."""
        amounts: dict[str, Exact] = {}
        found = [batch.amounts for batch in self.outbox.batches()]
        waiting: dict[str, Exact] = {}
        for stream, amount in self.recorder.sums().items():
            waiting[stream.meter] = add(waiting.get(stream.meter, 0), amount)
        for some in (*found, self.journal.unconverted(), waiting):
            for meter, amount in some.items():
                amounts[meter] = add(amounts.get(meter, 0), amount)
        return {meter: amount for meter, amount in amounts.items() if amount}

    def stats(self) -> dict[str, int]:
        """What went other ways than it should, since the process began; all 0 where all is well, but for the last.

        `in_memory`: times that the disk did not take usage, which was kept in memory. `rejected_points`: points in
        dead-letter files. `held_back`: times that a refused request found these full, and stayed in the outbox.
        `refused`: recordings whose quantity could not be counted. `not_billed`: calls that their meter's `billable` did
        not bill.
        """
        return {
            "in_memory": self.packer.in_memory + self.recorder.spilled,
            "rejected_points": self.letters.points,
            "held_back": self.letters.held_back,
            "refused": sum(self.recorder.refused().values()),
            "not_billed": sum(self.recorder.not_billed().values()),
        }

    def state(self) -> State | None:
        """What is shown of it by instruments; None where nothing is."""
        if not self.mirror.is_open:
            return None
        stats, exporter = self.stats(), self.exporter
        return State(
            in_memory=stats["in_memory"],
            dead_letters=stats["rejected_points"],
            held_back=stats["held_back"],
            refused=stats["refused"],
            outbox_bytes=self.outbox.size,
            outbox_requests=len(self.outbox),
            acknowledged_ago_s=None if exporter is None else exporter.acknowledged_ago_s(),
        )

    def exporters(self) -> list[UsageExporter]:
        """The one that sends, and the last one that did: a fork in the meantime, or soon after, has to wait for what is
        left of its connection."""
        return [one for one in (self.exporter, self._ended) if one is not None]

    def start_over_in_child(self) -> None:
        """After a fork: drop what the parent counted and will send, with every lock that it may have held."""
        self.recorder.close_inherited()
        self.journal.close_inherited()
        self.recovery.close_inherited()
        # The parent's gRPC channel must not be closed, or collected, by a process that has none of its threads.
        self._inherited.append((self.exporters(), self.outbox, self.recorder, self.journal))
        self.meters.new_lock()
        self._new_parts()
        if self.resource is not None:
            self.resource = of_forked_child(self.resource)
            if self.settings is not None and self.enabled:
                self._show(self.settings)
                self._open(self.settings, self.resource)

    def _show(self, settings: Settings) -> None:
        if settings.mirrors:
            self.mirror.open(settings.mirrors_accounts, self.meters.declared())
            if self._state_instruments is not None:
                self._state_instruments.show()
        else:
            self.mirror.close()

    def _open(self, settings: Settings, resource: Resource) -> None:
        endpoint = endpoint_of(settings)
        place = Path(settings.state_dir or default_state_dir()) / service_key(resource, endpoint)
        producer = producer_record(resource, conventions.SCOPE_NAME, VERSION)
        self.letters.place = place if HAS_LOCKS else None
        exporter = UsageExporter(
            self.recorder,
            self.outbox,
            self.journal,
            self.recovery,
            self.merger,
            Delivery(self.outbox, self.letters, self.reporter, lambda: _connect(endpoint)),
            place=place,
            interval_s=settings.interval_s,
            reporter=self.reporter,
            before_cut=lambda: self.late.settle(settings.interval_s),
        )
        self.journal.open(place, producer, int(settings.interval_s * 1e9), self.recorder)
        self.exporter = exporter  # now that what it sends says who sends it

    def usage_waits(self) -> None:
        """Something waits for the end of a call: somebody must look whether that comes."""
        if self.exporter is not None:
            self.exporter.start()

    def _on_first_usage(self) -> None:
        exporter = self.exporter
        if exporter is not None:
            exporter.start()
        elif self.settings is None and not self._configuring:
            self.reporter.warning(
                "unconfigured", "usage is recorded but tallymark.configure() has not been called: it is kept until then"
            )


def service_key(resource: Resource, endpoint: Endpoint) -> str:
    """The name of the folder that one service's processes share, for as long as they send to one place with one
    credential: usage never goes out under another one, which may be another tenant's."""
    names = [
        str(resource.attributes.get(name, "")) for name in (conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME)
    ]
    identifying = [*names, endpoint.url, endpoint.headers, endpoint.client_certificate]
    readable = re.sub(r"[^A-Za-z0-9_.]+", "_", ".".join(filter(None, names)))[:80].lstrip(".")
    return f"{readable or 'service'}-{hashlib.sha256(json.dumps(identifying).encode()).hexdigest()[:16]}"


def _refuse_subinterpreter() -> None:
    """The end of a subinterpreter does not wait for threads: up to Python 3.12 it would end the whole process, and
    gRPC cannot be loaded into an isolated one."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise SettingsError(
                "tallymark cannot be configured in a subinterpreter: run the service in the main one "
                "(in mod_wsgi: WSGIApplicationGroup %{GLOBAL})"
            )
        return


def _import_grpc() -> None:
    """In `configure()`, not in the sender's thread, because a child forked during that import could never finish it,
    and an interpreter that is ending may not begin it."""
    import grpc  # noqa: F401


def _connect(endpoint: Endpoint) -> Client:
    return GrpcClient(endpoint, VERSION)
