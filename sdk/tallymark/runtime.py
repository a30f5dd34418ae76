"""The process's one runtime, and the only module with global state."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tallymark.assembly import VERSION, Runtime
from tallymark.exporting import UsageExporter
from tallymark.meters import Meters
from tallymark.mirror import Instruments
from tallymark.settings import Baggage, MirrorSetting, Settings, make_settings
from tallymark.state import StateInstruments

instruments = Instruments(lambda: active.mirror, VERSION)
state_instruments = StateInstruments(lambda: active, VERSION)
_held: dict[int, list[UsageExporter]] = {}
"""By thread that is forking: exporters that send nothing in the meantime."""


def new_runtime(meters: Meters | None = None) -> Runtime:
    """A runtime of its own, for tests and `tallymark.testing`: see `using`."""
    return Runtime(instruments, meters, state_instruments)


_runtimes: list[Runtime] = [new_runtime()]
active: Runtime = _runtimes[0]
"""The runtime that usage goes to. Read as `runtime.active` where a call would cost too much, else by `current()`."""


when_configured: list[Callable[[Settings], None]] = []
"""Called after each `configure()`, by modules that this one may not know."""


def current() -> Runtime:
    """The runtime that usage goes to."""
    return active


@contextmanager
def using(runtime: Runtime) -> Iterator[Runtime]:
    """For tests: usage of the whole process goes to `runtime` inside the block."""
    global active
    _runtimes.append(runtime)
    active = runtime
    try:
        yield runtime
    finally:
        _runtimes.remove(runtime)
        active = _runtimes[-1]


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
    state_dir: str | os.PathLike[str] | None = None,
    baggage: Baggage | None = None,
    mirror: MirrorSetting | None = None,
) -> None:
    """Say where usage goes, and start sending what was recorded so far.

    Every argument may be left out; then the variable counts, then OpenTelemetry's own.

    - `endpoint` (TALLYMARK_ENDPOINT): the collector, as in "http://localhost:4317".
    - `headers` (TALLYMARK_HEADERS, name=value,name=value): sent with every export; the tenant's credential.
    - `insecure` (TALLYMARK_INSECURE): no TLS for an endpoint without a scheme.
    - `timeout` (TALLYMARK_TIMEOUT, OTEL_EXPORTER_OTLP_TIMEOUT): seconds for one attempt of an export, 10.
    - `interval` (TALLYMARK_EXPORT_INTERVAL, OTEL_METRIC_EXPORT_INTERVAL in ms): seconds between exports, 10.
    - `shutdown_timeout` (TALLYMARK_SHUTDOWN_TIMEOUT): seconds that the end of the process, or of an
      ASGI application's lifespan, waits for delivery, 10.
    - `resource`: attributes of this process, over OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.
    - `disabled` (TALLYMARK_DISABLED): record nothing at all. OTEL_SDK_DISABLED does not silence usage.
    - `state_dir` (TALLYMARK_STATE_DIR): the folder that keeps usage until it is acknowledged, whatever becomes of the
      process; $XDG_STATE_HOME/tallymark or ~/.local/state/tallymark. It must outlive the process (a volume, in a
      container). Where it cannot be written to, usage is kept in memory, with an error in the log.
    - `baggage` (TALLYMARK_BAGGAGE): "send" tells the services that this one calls whom a request is for, "accept" takes
      callers' word for it, True does both. It is a header that anybody can write: see `tallymark.baggage`.
    - `mirror` (TALLYMARK_MIRROR): show usage as ordinary counters of the process's MeterProvider too, for monitoring;
      they are never billed. True leaves accounts out, "accounts" shows them, at most 2,000 series of a meter. The
      SDK's own state is shown beside them, as `tallymark.sdk.*`.

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
        state_dir=state_dir,
        baggage=baggage,
        mirror=mirror,
    )
    active.configure(settings)
    for tell in when_configured:
        tell(settings)


def flush(timeout: float = 10.0) -> bool:
    """Send usage now and wait for it, at most `timeout` seconds.

    True only when everything that this process recorded before the call has been acknowledged by the collector. What
    has not is kept and sent later. What the collector refuses for good goes to a dead-letter file beside the journal;
    the next flush tells of it by False, once. It blocks: on an event loop, call it by `asyncio.to_thread`.
    """
    return active.flush(timeout)


def shutdown(timeout: float | None = None) -> bool:
    """Flush, then stop sending; True when everything recorded before the call has been acknowledged.

    Waits at most `timeout` seconds (the `shutdown_timeout` of `configure()` when left out). It is called at the end of
    the process by itself. Usage recorded afterwards, or not delivered, waits for another `configure()`.

    A signal's handler may call it, and `flush()`, too. Where it has interrupted `configure()` both only tell whether
    anything is left, and that shuts down at its end.
    """
    return active.shutdown(timeout)


def _before_fork() -> None:
    exporters = [exporter for runtime in _runtimes for exporter in runtime.exporters()]
    _held[threading.get_ident()] = [exporter for exporter in exporters if exporter.hold_sending()]


def _after_fork_in_parent() -> None:
    for exporter in _held.pop(threading.get_ident(), ()):
        exporter.send_again()
    for runtime in _runtimes:
        if runtime.exporter is not None:
            runtime.exporter.leave_recovery_to_others()


def _after_fork_in_child() -> None:
    instruments.after_fork()
    state_instruments.after_fork()
    _held.clear()
    for runtime in _runtimes:
        runtime.start_over_in_child()


def finish() -> None:
    """For integrations that are told of the end of what they serve: deliver what is left, and tell of what could not
    be. A process that a signal ends afterwards gets to no exit handler.

    It blocks, for the `shutdown_timeout` at most, of which an exit handler that follows has only the rest. Usage that
    is recorded afterwards is kept and sent as ever.
    """
    runtime = active
    if not runtime.finish():
        _tell_of_undelivered(runtime, "the service")


def _at_exit() -> None:
    runtime = active
    if not runtime.end():
        _tell_of_undelivered(runtime, "the process")


def _tell_of_undelivered(runtime: Runtime, what: str) -> None:
    left = runtime.undelivered()
    if left:
        where = runtime.journal.where()
        runtime.reporter.error(
            "lost",
            "%s ends with usage that no collector has acknowledged: %s; %s",
            what,
            ", ".join(f"{meter}={amount}" for meter, amount in sorted(left.items())),
            "it is lost" if where is None else f"the next process delivers what is in {where}",
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child, after_in_parent=_after_fork_in_parent)
atexit.register(_at_exit)
