"""The evidence: the current span says which account used how much of which meter.

A span carries one account. Usage of another one on the same span goes into an event, so that no evidence ever stands
under an account that is not its own.

What is on spans that will be exported is counted beside the usage, in the same journal, so that the two can be compared
under any sampling. Counted is what can be read back from the span: one that ended meanwhile takes nothing any more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.context import get_current

from tallymark import conventions
from tallymark.meters import Meter
from tallymark.quantities import Exact, add, from_attribute, to_attribute
from tallymark.recorder import Recorder
from tallymark.streams import Series

if TYPE_CHECKING:
    from tallymark.identity import Identity

DEFAULT_MAX_EVENTS: Final = 128
"""OpenTelemetry's limit on a span's events, where its span does not tell another one."""


class SpanEvidence:
    """Writes usage onto spans. One lock for the process: two threads may record on one span, and its quantity is
    read, added to and written."""

    def __init__(self, recorder: Recorder) -> None:
        # Re-entrant: a generator that is collected in the midst of it, or a signal's handler, may record as well.
        self._lock = threading.RLock()
        self._recorder = recorder
        self._series: dict[Meter, Series] = {}

    def add_to_current_span(self, meter: Meter, identity: Identity, quantity: Exact) -> None:
        """Add to `tallymark.meter.<meter>` of the current span, if it is being recorded."""
        if not get_current():  # nothing at all is in OpenTelemetry's context: the usual case without tracing
            return
        span = trace.get_current_span()
        if span.is_recording():
            with self._lock:
                written = _add(span, meter, identity, quantity)
            # A collector keeps no evidence of nobody; a span that is recorded but not sampled is never exported.
            if written and quantity and identity.account is not None and span.get_span_context().trace_flags.sampled:
                self._recorder.add((self._evidence_of(meter), identity.account, None), quantity)

    def _evidence_of(self, meter: Meter) -> Series:
        found = self._series.get(meter)
        if found is None:
            found = self._series.setdefault(meter, Series(meter, (), evidence=True))
        return found


def _add(span: trace.Span, meter: Meter, identity: Identity, quantity: Exact) -> bool:
    """True when the span has it."""
    # The API's span cannot be read; the SDK's can. On any other each recording counts as the span's first.
    existing = getattr(span, "attributes", None)
    written: Mapping[str, object] = existing if isinstance(existing, Mapping) else {}
    name = conventions.METER_PREFIX + meter.name
    if not _belongs_to(identity.account, written):
        if not _has_room(span):
            return False
        span.add_event(conventions.USAGE_EVENT, _event(name, identity, quantity))
        return span.is_recording()
    before = from_attribute(written.get(name))
    total = to_attribute(quantity if before is None else add(before, quantity))
    if identity.account is not None:
        span.set_attribute(conventions.ACCOUNT, identity.account)
    if identity.user is not None and conventions.USER not in written:
        span.set_attribute(conventions.USER, identity.user)
    span.set_attribute(name, total)
    read = getattr(span, "attributes", None)
    return read.get(name) == total if isinstance(read, Mapping) else span.is_recording()


def _has_room(span: trace.Span) -> bool:
    """Past the span's limit an event would push out the first one, which has been counted. What the host itself adds
    later may still do so: nobody tells."""
    events = getattr(span, "events", None)
    most = getattr(getattr(span, "_limits", None), "max_events", DEFAULT_MAX_EVENTS)
    return most is None or not isinstance(events, Sequence) or len(events) < most


def _belongs_to(account: str | None, written: Mapping[str, object]) -> bool:
    """Whether the span is this account's: it names it, or names nobody and carries no usage yet. A span whose usage
    so far has no account stays that way."""
    owner = written.get(conventions.ACCOUNT)
    if owner is not None or account is None:
        return owner == account
    return not any(name.startswith(conventions.METER_PREFIX) for name in written)


def _event(name: str, identity: Identity, quantity: Exact) -> dict[str, int | float | str]:
    event: dict[str, int | float | str] = {name: to_attribute(quantity)}
    if identity.account is not None:
        event[conventions.ACCOUNT] = identity.account
    if identity.user is not None:
        event[conventions.USER] = identity.user
    return event
