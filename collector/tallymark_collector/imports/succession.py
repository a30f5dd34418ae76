"""Whether a mapping may follow the one that a source was read with.

A new customer has a new key, a new endpoint a new route: the tables of `account.lookup` and `routes` may grow.
Everything else stays as it was when the first line was billed: read otherwise, lines would be other usage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tallymark_collector.errors import UserError
from tallymark_collector.imports.rejects import Origin
from tallymark_collector.store.imports import Kept, Registration

_SHOWN: Final = 3
"""Entries of a table that a message names."""


def registration(origin: Origin, now: Mapping[str, Any], kept: Kept) -> Registration | None:
    """What is to be kept with the first piece; None where the mapping is there. Raises UserError where it must not be.

    A mapping that has billed nothing yet binds nobody: what was read with it is read again.
    """
    before = kept.mappings[-1] if kept.mappings else None
    if before == now:
        return None
    if before is not None and kept.billed:
        _check(origin, before, now)
    return Registration(
        origin.tenant, origin.source, len(kept.mappings), now, forgets=before is not None and not kept.billed
    )


def _check(origin: Origin, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    differ = [found for name in names if (found := _difference(name, before.get(name), now.get(name)))]
    if not differ:
        return
    how = ", ".join(said for _, said in differ if said)
    raise UserError(
        f"the source {origin.source!r} was imported with another mapping: {', '.join(name for name, _ in differ)}"
        f" differ{how and f': {how}'}. Entries of account.lookup and routes may be added, none changed, moved or left"
        " out; nothing else may change once a line is billed. Import with the mapping of then (the last in"
        " usage_import_mapping, else usage_import_source has it), or give files that it has not read another --source"
    )


def _difference(name: str, before: Any, now: Any) -> tuple[str, str] | None:
    """What differs, and how, where it is no addition."""
    if name == "routes" and _within(before or (), now or ()):
        return None
    if name != "account" or not isinstance(before, dict) or not isinstance(now, dict):
        return name, ""
    old, new = before.get("lookup"), now.get("lookup")
    if old is None or new is None or {**before, "lookup": None} != {**now, "lookup": None}:
        return name, ""
    changed = [
        f"{key!r} was {account!r} and is {repr(new[key]) if key in new else 'left out'}"
        for key, account in sorted(old.items())
        if new.get(key) != account
    ]
    more = f" and {len(changed) - _SHOWN:,} more" if len(changed) > _SHOWN else ""
    return ("account.lookup", ", ".join(changed[:_SHOWN]) + more) if changed else None


def _within(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether all that was there is still there, in its order."""
    rest = iter(now)
    return all(any(each == other for other in rest) for each in before)
