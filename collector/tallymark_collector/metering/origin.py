"""Where measured usage came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


def kept(tenant: str, refused: Iterable[Refused], time_ns: int, signal: str, payload: bytes) -> Sequence[Quarantined]:
    """The item for the quarantine: once for each reason, whichever meters had it. What is released is the whole item,
    and each of its meters looks at it again."""
    by_reason: dict[str, list[Refused]] = {}
    for one in refused:
        by_reason.setdefault(one.refusal.reason, []).append(one)
    found = []
    for several in by_reason.values():
        first = several[0]
        details = dict.fromkeys(f"meter {one.meter}: {one.refusal.detail}" for one in several)
        refusal = Refusal(first.refusal.reason, "; ".join(details))
        found.append(Quarantined(tenant, first.account, first.meter, time_ns, refusal, signal, payload))
    return found
