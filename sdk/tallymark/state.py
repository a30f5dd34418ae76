"""The SDK's own state as instruments of the host's MeterProvider: is the disk full, does the collector take usage?

Beside the mirror, where that is asked for, and in its scope: never billed, and without any account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from tallymark.instruments import WAIT_S, InstrumentMaker
from tallymark.reporting import Reporter

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.metrics import Meter as OtelMeter


@dataclass(frozen=True, slots=True)
class State:
    """How one process's delivery fares. The first four only grow, and stay 0 where all is well."""

    in_memory: int
    dead_letters: int
    held_back: int
    refused: int
    outbox_bytes: int
    outbox_requests: int
    acknowledged_ago_s: float | None
    """None before the first one."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One of its values, as it is shown."""

    name: str
    kind: str
    """OpenTelemetry's, in the name of the method that makes it."""
    unit: str
    value: Callable[[State], int | float | None]
    description: str


SHOWN: Final = (
    Shown(
        "tallymark.sdk.in_memory",
        "counter",
        "{time}",
        lambda state: state.in_memory,
        "Times that the disk did not take usage, which is in memory alone until it is acknowledged.",
    ),
    Shown(
        "tallymark.sdk.dead_letters",
        "counter",
        "{point}",
        lambda state: state.dead_letters,
        "Points that the collector refused for good, kept in dead-letter files.",
    ),
    Shown(
        "tallymark.sdk.held_back",
        "counter",
        "{time}",
        lambda state: state.held_back,
        "Times that a refused request found the dead-letter files full, and stayed in the outbox.",
    ),
    Shown(
        "tallymark.sdk.refused",
        "counter",
        "{recording}",
        lambda state: state.refused,
        "Recordings without a usable quantity.",
    ),
    Shown(
        "tallymark.sdk.outbox.size",
        "up_down_counter",
        "By",
        lambda state: state.outbox_bytes,
        "Requests that no collector has acknowledged yet.",
    ),
    Shown(
        "tallymark.sdk.outbox.requests",
        "up_down_counter",
        "{request}",
        lambda state: state.outbox_requests,
        "Requests that no collector has acknowledged yet.",
    ),
    Shown(
        "tallymark.sdk.acknowledged.age",
        "gauge",
        "s",
        lambda state: state.acknowledged_ago_s,
        "Since the collector last acknowledged a request. It grows in a process that records nothing, too.",
    ),
)


class Observed(Protocol):
    """Whose state it is."""

    reporter: Reporter

    def state(self) -> State | None:
        """None where nothing is to be shown."""


class StateInstruments(InstrumentMaker[Shown]):
    """The process's. `observed` gives what is in force."""

    def __init__(self, observed: Callable[[], Observed], version: str, provider: MeterProvider | None = None) -> None:
        super().__init__(version, provider, len(SHOWN))
        self._observed = observed

    def show(self) -> None:
        """Make them, if they are not there yet."""
        self.want(SHOWN, WAIT_S)

    def make(self, otel_meter: OtelMeter, wanted: Shown) -> None:
        create = getattr(otel_meter, f"create_observable_{wanted.kind}")
        create(wanted.name, [partial(self._observe, wanted)], wanted.unit, wanted.description)

    def report(self, wanted: Shown, error: Exception) -> None:
        self._observed().reporter.error("state", "%s cannot be shown: %r", wanted.name, error, exc_info=error)

    def _observe(self, shown: Shown, _: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        try:
            state = self._observed().state()
            value = None if state is None else shown.value(state)
        except Exception as error:
            self.report(shown, error)
            return []
        return [] if value is None else [Observation(value)]
