"""Which mapping may follow which: additions to two tables, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.imports.mapping import mapping_of
from tallymark_collector.imports.rejects import Origin
from tallymark_collector.imports.succession import registration
from tallymark_collector.store.imports import Kept

ORIGIN = Origin("default", "web-1")


def told(lookup: dict[str, str] | None = None, routes: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    account = {"field": "user"} | ({} if lookup is None else {"lookup": lookup})
    return mapping_of({"format": "combined", "account": account, "routes": routes or [], **more}).told()


def test_the_first_and_the_same() -> None:
    first = registration(ORIGIN, told(), Kept((), billed=False))
    assert first is not None
    assert (first.number, first.forgets, first.mapping) == (0, False, told())
    assert registration(ORIGIN, told(), Kept((told(),), billed=True)) is None


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (told({"a": "x"}), told({"b": "y", "a": "x"})),
        (told(), told(routes=["/a"])),
        (told(routes=["/a", "/b"]), told(routes=["/c", "/a", {"match": "/d", "route": "/e"}, "/b"])),
        (told(routes=["/a", "/a"]), told(routes=["/a", "/b", "/a"])),
        (told({"a": "x"}, ["/a"]), told({"a": "x", "b": "y"}, ["/a", "/b"])),
    ],
)
def test_additions(before: dict[str, Any], now: dict[str, Any]) -> None:
    found = registration(ORIGIN, now, Kept((told({"z": "z"}), before), billed=True))
    assert found is not None
    assert (found.number, found.forgets) == (2, False)
    with pytest.raises(UserError, match="another mapping"):
        registration(ORIGIN, before, Kept((now,), billed=True))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (told(), told({"a": "x"}), "account differ. "),
        (told({"a": "x"}), told(), "account differ. "),
        (told({"a": "x"}), told({"a": "y", "b": "z"}), "account.lookup differ: 'a' was 'x' and is 'y'. "),
        (
            told(dict.fromkeys("abcde", "x")),
            told({"a": "x", "b": "y"}),
            "account.lookup differ: 'b' was 'x' and is 'y', 'c' was 'x' and is left out, 'd' was 'x' and is left out"
            " and 1 more. ",
        ),
        (told(routes=["/a", "/b"]), told(routes=["/b", "/a"]), "routes differ. "),
        (told({"a": "x"}, ["/a"]), told({"a": "y"}, ["/b"]), "account.lookup, routes differ: 'a' was 'x' and is 'y'. "),
        (told(routes=["/a"]), told(routes=["/a", "/b"], unmatched_route="other"), "unmatched_route differ. "),
    ],
)
def test_changes(before: dict[str, Any], now: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        registration(ORIGIN, now, Kept((before,), billed=True))
    assert str(refused.value).startswith(f"the source 'web-1' was imported with another mapping: {said}")
    instead = registration(ORIGIN, now, Kept((before,), billed=False))
    assert instead is not None
    assert (instead.number, instead.forgets) == (1, True), "what has billed nothing binds nobody"
