"""What of one request is kept in quarantine, within a limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from tallymark_collector.errors import TooLarge
from tallymark_collector.model import Quarantined

MAX_BYTES: Final = 128 * 2**20
"""Payloads of one request's items: each item has a copy of its resource, scope and metric or span."""

MAX_ITEMS: Final = 200_000
"""Items of one request."""
AT_ONCE: Final = 20_000
"""Items that one transaction writes: they are rows with indexes, and while they are written, a second, others wait."""


@dataclass(slots=True)
class SetAside:
    """Items of one request."""

    quarantined: list[Quarantined] = field(default_factory=list)
    rejected: int = 0
    """Data points or spans of which anything is among `quarantined`."""
    aside_bytes: int = 0
    """What the items' payloads take."""

    def keep(self, items: Iterable[Quarantined]) -> None:
        """Adds items. Raises TooLarge where there are more than `MAX_ITEMS`, or their payloads come to more than
        `MAX_BYTES`: nothing of the request is kept then."""
        for item in items:
            if len(self.quarantined) == MAX_ITEMS:
                raise TooLarge(
                    f"more than {MAX_ITEMS:,} points or spans of this request cannot be billed, each of which would be"
                    f" kept: send fewer at once. The last is of meter {item.meter[:64]!r}: {item.refusal.detail}"
                )
            self.aside_bytes += len(item.payload)
            if self.aside_bytes > MAX_BYTES:
                raise TooLarge(
                    f"what of this request cannot be billed takes more than {MAX_BYTES // 2**20} MiB,"
                    f" each point with a copy of its resource: send fewer at once. The last is of meter"
                    f" {item.meter[:64]!r}: {item.refusal.detail}"
                )
            self.quarantined.append(item)
