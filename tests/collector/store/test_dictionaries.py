"""New streams on their way to the database: a resource is made and sent once, however many streams have it, and others
have their turn meanwhile."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tallymark_collector.model import Attributes, Stream
from tallymark_collector.processors.at_once import at_once
from tallymark_collector.store import dictionaries
from tallymark_collector.store.dictionaries import LOOKED_THROUGH, PIECE, PIECE_CHARACTERS, Dictionaries, registration
from tests.support.usage import stream

T = TypeVar("T")


def rests(work: Generator[None, None, T]) -> tuple[int, T]:
    """How often others have their turn, and the result."""
    found = 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            return found, end.value
        found += 1


def described(**attributes: Any) -> Attributes:
    return Attributes.of({"service.name": "shop", **attributes})


def streams(count: int, resource: Attributes, **more: Any) -> list[Stream]:
    return [replace(stream(n=i), resource=resource, **more) for i in range(count)]


def rows(piece: list[list[object]]) -> list[tuple[Any, ...]]:
    """As the statement has them: with the shared texts in place."""
    scopes, resources, *columns = piece
    return [(*row, scopes[scope - 1], resources[at - 1]) for *row, scope, at in zip(*columns, strict=True)]  # type: ignore[operator]


def characters(piece: list[list[object]]) -> int:
    scopes, resources, *_ = piece
    return sum(len(str(text)) for text in (*scopes, *resources))


def test_a_resource_is_made_once_and_sent_once_in_a_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made, and sent, for each of its streams: 4,000 in a request of 300 KB came to 128 MB."""
    made: list[Attributes] = []
    whole = dictionaries.attributes_json
    monkeypatch.setattr(dictionaries, "attributes_json", lambda one: made.append(one) or whole(one))
    resource = described(labels="x" * 30_000)
    found = at_once(registration(streams(4000, resource, scope_name="y" * 30_000)))
    assert [one for one in made if one is resource] == [resource]
    assert [len(piece[2]) for piece in found.streams] == [PIECE] * 3 + [4000 - 3 * PIECE]
    assert [(len(piece[0]), len(piece[1])) for piece in found.streams] == [(1, 1)] * 4
    assert {json.loads(row[-1])["labels"] for piece in found.streams for row in rows(piece)} == {"x" * 30_000}


def test_streams_have_their_own_resource_and_scope_in_their_row() -> None:
    given = [
        replace(stream(n=i), resource=described(i=i % 7), scope_name=f"scope {i % 5}\0", source=None) for i in range(50)
    ]
    found = at_once(registration(at_once(Dictionaries().unknown(given))))
    by_id = {row[1]: row for piece in found.streams for row in rows(piece)}
    for one in given:
        account, _, series, tenant, temporality, scope, resource = by_id[one.id]
        assert (account, series, tenant, temporality) == ("acme", one.series.id, "default", 1)
        assert scope == one.scope_name.replace("\0", "\ufffd")
        assert json.loads(resource) == dict(one.resource)
    assert [len(piece[1]) for piece in found.streams] == [7], "equal ones are one, whatever objects they are"


def test_all_writers_insert_in_one_order() -> None:
    given = [stream(n=i) for i in range(2 * LOOKED_THROUGH + 1)]
    pause, new = rests(Dictionaries().unknown(given))
    assert [one.id for one in new] == sorted(one.id for one in given)
    assert pause >= 2
    pause, found = rests(registration(new))
    assert [row[1] for piece in found.streams for row in rows(piece)] == [one.id for one in new]
    series = [identity for piece in found.series for identity in piece[1]]
    assert series == sorted(one.series.id for one in given)
    assert pause >= 2 * (len(given) // PIECE), "of series, and of streams"


def test_statements_are_bounded_by_what_they_hold() -> None:
    resources = [described(labels=f"{i}" + "x" * 30_000) for i in range(100)]
    given = [replace(stream(n=i), resource=resources[i % 100]) for i in range(300)]
    pause, found = rests(registration(given))
    assert max(map(characters, found.streams)) < PIECE_CHARACTERS + 2 * 30_100
    assert pause >= len(found.streams) - 1 > 5
    long = [stream(**{f"d{k}": f"{i}" + "x" * 1000 for k in range(30)}) for i in range(100)]
    pause, found = rests(registration(long))
    assert pause >= len(found.series) - 1 > 5


def test_one_text_of_many_objects_is_made_within_bounds() -> None:
    given = [replace(stream(n=i), resource=described(labels="x" * 30_000)) for i in range(200)]
    pause, found = rests(registration(given))
    assert pause >= 200 * 30_000 // (PIECE_CHARACTERS + 60_000)
    assert all(len(piece[1]) == 1 for piece in found.streams)


def test_what_is_committed_is_known_and_said_on_the_stream() -> None:
    known = Dictionaries()
    given = [stream(n=i) for i in range(3)]
    again = [stream(n=i) for i in range(3)]  # decoded anew
    assert len(at_once(known.unknown(given))) == 3
    assert not any(one.written for one in given)
    known.remember(given)
    assert all(one.written for one in given)
    assert at_once(known.unknown(again)) == []
    assert all(one.written for one in again)
