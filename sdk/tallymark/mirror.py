"""Usage shown as ordinary OpenTelemetry counters of the host's MeterProvider, for Prometheus and other monitoring.

Off unless asked for, and never billed: the scope is `conventions.MIRROR_SCOPE_NAME`, which the collector passes over,
and the account, where it is shown at all, stands under another name than the billed one.

Nothing happens on a handler's path. The counters are observable: when the host collects, their callbacks add what the
running interval holds to what earlier intervals held, which the recorder hands over at each cut. So a counter holds
exactly what this process has recorded since the mirror was opened, and never falls.

An instrument is made for each meter that is declared when `configure()` is called; for others at the first cut after
their first usage (`tallymark.instruments`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from tallymark import conventions
from tallymark.dimensions import Dimension, Value
from tallymark.instruments import WAIT_S, InstrumentMaker
from tallymark.quantities import INT64_MAX, Exact, add
from tallymark.recorder import Recorder, total_of
from tallymark.reporting import Reporter
from tallymark.segment import Contents, Segment, parse

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.metrics import Meter as OtelMeter

Shown = tuple[str, str]
"""(name, unit) of a meter"""
AttributeSet = tuple[Dimension, ...]

MAX_SETS: Final = 1_999
"""Attribute sets of one meter that are shown apart: with that of the overflow as many as OpenTelemetry keeps. Later
ones are added up in `otel.metric.overflow`."""

MAX_SHOWN: Final = 1_000
"""Meters that are shown; names made from data must not fill the host's memory."""

_OVERFLOW: Final[AttributeSet] = ((conventions.OVERFLOW, "bool", True),)

Totals = dict[Shown, dict[AttributeSet, Exact]]


class Mirror:
    """What one recorder has recorded, by what is shown. `observe` never raises, `keep` neither."""

    def __init__(self, recorder: Recorder, instruments: Instruments, reporter: Reporter) -> None:
        self._recorder = recorder
        self._instruments = instruments
        self._reporter = reporter
        self._with_accounts = False
        self._open = False
        # Guarded by the recorder, which hands over one cut at a time and none while it is copied.
        self._kept: Totals = {}
        # What one collection still has to ask for, guarded by the lock.
        self._lock = threading.Lock()
        self._seen: Totals = {}

    def open(self, with_accounts: bool, declared: Iterable[Shown]) -> None:
        """Show what is recorded from the running interval on. Again: goes on, where accounts are shown as before;
        begins at zero otherwise."""
        with self._recorder.between_cuts() as copies:
            if self._recorder.on_cut is None or with_accounts != self._with_accounts:
                self._kept, self._with_accounts = {}, with_accounts
            self._recorder.on_cut = self.keep
            self._open = True
        recorded = {(s.meter, s.unit) for s in total_of(*map(parse, copies)) if not s.evidence}
        self._instruments.want(sorted({*declared, *recorded}), wait_s=WAIT_S)

    @property
    def is_open(self) -> bool:
        """Whether anything is shown."""
        return self._open

    def close(self) -> None:
        """Show nothing more. What is recorded meanwhile is kept, so that no counter falls when it is opened again."""
        self._open = False

    def keep(self, segments: list[Segment]) -> None:
        """Take over the sums of an interval that has ended."""
        try:
            self._add(self._kept, [segment.contents(rests=True) for segment in segments])
            self._instruments.want([*self._kept])
        except Exception as error:
            self._open = False
            self._reporter.error("mirror.keep", "usage is mirrored no longer: %r", error, exc_info=error)

    def observe(self, shown: Shown) -> Iterable[Observation]:
        """The totals of one meter, for a collection that is under way."""
        from opentelemetry.metrics import Observation

        if not self._open:
            return []
        try:
            return [Observation(_number(total), _attributes(of)) for of, total in self._totals(shown).items()]
        except Exception as error:
            self._reporter.error("mirror.observe", "usage could not be mirrored: %r", error, exc_info=error)
            return []

    def report(self, name: str, error: Exception) -> None:
        """An instrument could not be made."""
        self._reporter.error("mirror.instrument", "meter %s cannot be mirrored: %r", name, error, exc_info=error)

    def _totals(self, shown: Shown) -> Mapping[AttributeSet, Exact]:
        # One collection asks for each meter once: all are told from one reading, and asking again begins another.
        with self._lock:
            if shown not in self._seen:
                with self._recorder.between_cuts() as copies:
                    seen = {meter: dict(sets) for meter, sets in self._kept.items()}
                self._add(seen, [parse(copy) for copy in copies])
                self._seen = seen
            return self._seen.pop(shown, {})

    def _add(self, to: Totals, contents: Iterable[Contents]) -> None:
        for stream, amount in total_of(*contents).items():
            if stream.evidence:
                continue
            shown = (stream.meter, stream.unit)
            if shown not in to and len(to) >= MAX_SHOWN:
                self._reporter.warning(
                    "mirror.limit", "more than %d meters are in use: %s is not mirrored", MAX_SHOWN, shown
                )
                continue
            sets = to.setdefault(shown, {})
            own: AttributeSet = stream.dimensions
            if stream.plan is not None:
                own = (*own, (conventions.PLAN, "string", stream.plan))
            if self._with_accounts and stream.account is not None:
                own = (*own, (conventions.MIRROR_ACCOUNT, "string", stream.account))
            if own not in sets and len(sets) - (_OVERFLOW in sets) >= MAX_SETS:
                own = _OVERFLOW
            sets[own] = add(sets.get(own, 0), amount)


class Instruments(InstrumentMaker[Shown]):
    """The process's observable counters. `mirror` gives the one that is in force."""

    def __init__(self, mirror: Callable[[], Mirror], version: str, provider: MeterProvider | None = None) -> None:
        super().__init__(version, provider, MAX_SHOWN)
        self._mirror = mirror

    def make(self, otel_meter: OtelMeter, wanted: Shown) -> None:
        name, unit = wanted
        otel_meter.create_observable_counter(
            name, [partial(self._observe, wanted)], unit, "Usage, as recorded by Tallymark; not what is billed."
        )

    def report(self, wanted: Shown, error: Exception) -> None:
        self._mirror().report(wanted[0], error)

    def _observe(self, shown: Shown, _: CallbackOptions) -> Iterable[Observation]:
        return self._mirror().observe(shown)


def _number(total: Exact) -> int | float:
    """OpenTelemetry's exporter loses a whole batch on an integer over int64."""
    return total if isinstance(total, int) and total <= INT64_MAX else float(total)


def _attributes(of: AttributeSet) -> Mapping[str, Value]:
    return {name: value for name, _, value in of}
