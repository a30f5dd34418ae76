"""Where measured usage came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

from tallymark_collector.model import Attributes, Quarantined, Refusal


class Group(NamedTuple):
    """A resource and a scope, as bytes and decoded."""

    tenant: str
    resource: bytes
    scope: bytes
    attributes: Attributes
    """The resource's."""
    scope_name: str
    scope_version: str
    scope_attributes: Attributes
    broken: Refusal | None
    """Why they cannot be read."""


class Refused(NamedTuple):
    """What one meter would not count of an item."""

    meter: str
    account: str
    refusal: Refusal
    stream: UUID | None = None
    """Of a point whose stream is known."""
    source: UUID | None = None
    """Of a running total or a level whose source is known."""


def kept(tenant: str, refused: Iterable[Refused], time_ns: int, signal: str, payload: bytes) -> Sequence[Quarantined]:
    """The items for the quarantine: one for each meter, since what becomes of each is a decision of its own."""
    found = []
    for meter, account, (reason, detail), stream, source in refused:
        refusal = Refusal(reason, f"meter {meter}: {detail}")
        item = Quarantined(
            tenant, account, meter, time_ns, refusal, signal, payload, metered=True, stream=stream, source=source
        )
        found.append(item)
    return found
