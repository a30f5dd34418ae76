"""The evidence: the current span says which account used how much of which meter.

A span carries one account. Usage of another one on the same span goes into an event, so that no evidence ever stands
under an account that is not its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace

from tallymark import conventions
from tallymark.meters import Meter
from tallymark.quantities import Exact, add, from_attribute, to_attribute

if TYPE_CHECKING:
    from tallymark.identity import Identity


class SpanEvidence:
    """Writes usage onto spans. One lock for the process: two threads may record on one span, and its quantity is
    read, added to and written."""

    def __init__(self) -> None:
        # Re-entrant: a generator that is collected in the midst of it, or a signal's handler, may record as well.
        self._lock = threading.RLock()

    def add_to_current_span(self, meter: Meter, identity: Identity, quantity: Exact) -> None:
        """Add to `tallymark.meter.<meter>` of the current span, if it is being recorded."""
        span = trace.get_current_span()
        if span.is_recording():
            with self._lock:
                _add(span, meter, identity, quantity)


def _add(span: trace.Span, meter: Meter, identity: Identity, quantity: Exact) -> None:
    # The API's span cannot be read; the SDK's can. On any other each recording counts as the span's first.
    existing = getattr(span, "attributes", None)
    written: Mapping[str, object] = existing if isinstance(existing, Mapping) else {}
    name = conventions.METER_PREFIX + meter.name
    if not _belongs_to(identity.account, written):
        span.add_event(conventions.USAGE_EVENT, _event(name, identity, quantity))
        return
    before = from_attribute(written.get(name))
    total = quantity if before is None else add(before, quantity)
    if identity.account is not None:
        span.set_attribute(conventions.ACCOUNT, identity.account)
    if identity.user is not None and conventions.USER not in written:
        span.set_attribute(conventions.USER, identity.user)
    span.set_attribute(name, to_attribute(total))


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
