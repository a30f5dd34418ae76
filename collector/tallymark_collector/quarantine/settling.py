"""Some items, one transaction: their points and the notes of who did what, or nothing.

A lock on each item has two people take turns; the second is told what the first did. So a command that was killed may
be run again: what is done is done, with its points, and what is not is open. Items that are settled together come to
what they would have come to one after the other; where something stands in the way of that nothing of it is kept, and
they are settled by halves, down to single ones.

What stands between a release and counting twice:

- a point that is released as it was sent keeps its identity: sent again, or accepted before, it is a duplicate;
- one that was changed (an account, another meter) becomes a point of a stream of its own, whose identity is made of
  what was sent and of what it is billed as. The same usage that came in two wrappings is one point;
- usage that was billed as something else before is refused: the trail knows what every action was about.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from tallymark_collector.errors import StoreUnavailable
from tallymark_collector.metering import Rules
from tallymark_collector.model import Batch, Point, Refusal, Temporality, WriteResult, without_nul
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import Came
from tallymark_collector.quarantine import items
from tallymark_collector.quarantine.items import Action, Item
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.rereading import NotSettled as NotSettled
from tallymark_collector.quarantine.rereading import Reread, check, kind_of, reread
from tallymark_collector.quarantine.rules import Kind
from tallymark_collector.store import Store, levels, locks, source_streams, sources, writer
from tallymark_collector.store.database import Connection
from tallymark_collector.store.dictionaries import Dictionaries

GROUP: Final = 20
"""Items that are settled together."""
GROUP_BYTES: Final = 4 * 1024 * 1024
"""The same in bytes of their payloads; one that is larger is settled by itself."""


class Settled(NamedTuple):
    """What became of an item."""

    item: Item
    action: Action
    done_now: bool
    """False where somebody had closed it before: `action` says who."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who acts, and why."""

    name: str
    because: str = ""


Outcome: TypeAlias = Settled | NotSettled
Deciding: TypeAlias = Callable[[Connection, Sequence[Item]], Awaitable[list[Outcome]]]
"""What is done with items in one transaction; an outcome for each. Raises NotSettled: nothing of it may be kept."""


class _Note(NamedTuple):
    """A row of quarantine_action."""

    action: str
    because: str
    read: Reread | None = None
    result: WriteResult | None = None


_NUMBER: Final = (
    "SELECT coalesce(max(number), 0) + 1 FROM quarantine_action WHERE account = %(account)s AND digest = %(digest)s"
)

_NOTE_SQL: Final = f"""
INSERT INTO quarantine_action (account, digest, number, action, tenant, acted_by, because, changed, billed_to, quantity,
                               inserted, duplicates, evidence, origin, point, series)
VALUES (%(account)s, %(digest)s, ({_NUMBER}), %(action)s, %(tenant)s, %(by)s, %(because)s, %(changed)s, %(billed_to)s,
        %(quantity)s, %(inserted)s, %(duplicates)s, %(evidence)s, %(origin)s, %(point)s, %(series)s)"""  # noqa: S608

# Totals of one stream tell of each other: all of them are billed as one thing, or one amount is billed as two. What a
# file of meters makes of one origin is one meter's: that the file drops another dimension by now is no other usage.
_ELSEWHERE_SQL: Final = """
SELECT encode(digest, 'hex'), billed_to FROM quarantine_action
WHERE origin = %(origin)s AND (%(cumulative)s OR point = %(point)s)
  AND action IN ('released', 'attributed')
  AND CASE WHEN %(metered)s THEN billed_to <> %(account)s ELSE series <> %(series)s END
LIMIT 1"""

_DROPPED_SQL: Final = "SELECT evidence_from FROM usage_kept WHERE evidence_from > %s"


async def release(
    store: Store,
    item: Item,
    decision: Decision,
    person: Person,
    now_ns: int,
    rules: Rules | None = None,
    redaction: Redaction = STANDARD,
) -> Settled:
    """Bills an item, as a person decided; `attributed` where that names an account. `rules` is the file of meters that
    what such a file made usage is read with. Raises NotSettled, and then nothing was changed, or StoreUnavailable."""
    return await _alone(store, item, releasing(decision, person, now_ns, rules, redaction))


async def discard(store: Store, item: Item, person: Person) -> Settled:
    """Closes an item without billing it; its payload is kept. Raises NotSettled, StoreUnavailable."""
    return await _alone(store, item, discarding(person))


async def reopen(store: Store, item: Item, person: Person) -> Settled:
    """Undoes a discard; an item that is open already stays so. Raises NotSettled for what was billed: that would
    bill it again. Raises StoreUnavailable."""
    return await _alone(store, item, reopening(person))


async def _alone(store: Store, item: Item, deciding: Deciding) -> Settled:
    [outcome] = await store.settle(lambda connection: deciding(connection, [item]))
    if isinstance(outcome, NotSettled):
        raise outcome
    return outcome


async def together(store: Store, found: Sequence[Item], deciding: Deciding) -> AsyncIterator[tuple[Item, Outcome]]:
    """What became of each item, in their order; in groups, each of which is one transaction. Raises StoreUnavailable:
    what was not told of is as it was."""
    left = [*_groups(found)][::-1]
    while left:
        some = left.pop()
        try:
            outcomes = await store.settle(partial(_swapped, deciding, some))
        except NotSettled as error:
            if len(some) > 1:
                left += _halves(some)
                continue
            outcomes = [error]
        except StoreUnavailable as error:
            # Too much for the time that a transaction has, where the database is far away.
            if not error.away or len(some) == 1:
                raise
            left += _halves(some)
            continue
        for item, outcome in zip(some, outcomes, strict=True):
            yield item, outcome


def _halves(some: Sequence[Item]) -> list[Sequence[Item]]:
    middle = len(some) // 2
    return [some[middle:], some[:middle]]


async def _swapped(deciding: Deciding, some: Sequence[Item], connection: Connection) -> list[Outcome]:
    return await deciding(connection, some)


def _groups(found: Sequence[Item]) -> Iterator[Sequence[Item]]:
    first = size = 0
    for place, item in enumerate(found):
        if place > first and (place - first == GROUP or size + len(item.payload) > GROUP_BYTES):
            yield found[first:place]
            first, size = place, 0
        size += len(item.payload)
    if found:
        yield found[first:]


def releasing(
    decision: Decision,
    person: Person,
    now_ns: int,
    rules: Rules | None = None,
    redaction: Redaction = STANDARD,
) -> Deciding:
    """To bill items, as `release`."""
    action = "attributed" if decision.account is not None else "released"

    async def work(connection: Connection, some: Sequence[Item]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        fit: list[int] = []
        for place, item in enumerate(some):
            try:
                check(item, decision)
            except NotSettled as error:
                outcomes[place] = error
            else:
                fit.append(place)
        done = await _taken(connection, [some[place] for place in fit])
        reads: dict[int, Reread] = {}
        for place, last in zip(fit, done, strict=True):
            if last is not None and last.action != "reopened":
                outcomes[place] = Settled(some[place], last, done_now=False)
                continue
            try:
                reads[place] = reread(some[place], decision, rules, now_ns, redaction)
            except NotSettled as error:
                outcomes[place] = error
        origins = [read.origin.stream for read in reads.values() if read.origin is not None]
        await locks.all_taken(connection, [f"{locks.QUARANTINE}.{stream}" for stream in origins])
        _check_each_other(reads.values())
        for place, read in list(reads.items()):
            try:
                reads[place] = await _checked(connection, some[place], read)
            except NotSettled as error:
                del reads[place]
                outcomes[place] = error
        results = await _written(connection, [(some[place], read) for place, read in reads.items()])
        for (place, read), result in zip(reads.items(), results, strict=True):
            note = _Note(action, person.because, read, result)
            outcomes[place] = await _noted(connection, some[place], person, note)
        return [outcomes[place] for place in range(len(some))]

    return work


def discarding(person: Person) -> Deciding:
    """To close items, as `discard`."""

    async def work(connection: Connection, some: Sequence[Item]) -> list[Outcome]:
        if not person.because.strip():
            raise NotSettled("say why it is not to be billed: --because TEXT")
        outcomes: list[Outcome] = []
        for item, last in zip(some, await _taken(connection, some), strict=True):
            if last is not None and last.action != "reopened":
                outcomes.append(Settled(item, last, done_now=False))
            else:
                outcomes.append(await _noted(connection, item, person, _Note("discarded", person.because)))
        return outcomes

    return work


def reopening(person: Person) -> Deciding:
    """To open items again, as `reopen`."""

    async def work(connection: Connection, some: Sequence[Item]) -> list[Outcome]:
        done = await _taken(connection, some)
        # Whoever drops points of its time sees it open, or has dropped them by now.
        await locks.shared(connection, locks.KEPT)
        outcomes: list[Outcome] = []
        for item, last in zip(some, done, strict=True):
            if last is None:
                outcomes.append(NotSettled(f"{item.id} is open: nothing was done with it yet"))
            elif last.action == "reopened":
                outcomes.append(Settled(item, last, done_now=False))
            elif last.action != "discarded":
                outcomes.append(NotSettled(f"{item.id} cannot be opened again, it is billed: {last.sentence()}"))
            else:
                outcomes.append(await _noted(connection, item, person, _Note("reopened", person.because)))
        return outcomes

    return work


async def _taken(connection: Connection, some: Sequence[Item]) -> list[Action | None]:
    """Each item's last action, once nobody else is at work with any of them."""
    await locks.all_taken(connection, [f"{locks.QUARANTINE}.{item.id}" for item in some])
    return [await items.last_action(connection, item) for item in some]


def _check_each_other(reads: Iterable[Reread]) -> None:
    """Raises NotSettled where what becomes of one item depends on another one of them: what the trail, or what is
    stored, would say of it once the other is done."""
    billed: dict[UUID, tuple[UUID, str]] = {}
    for read in reads:
        if read.origin is None or read.found is None:
            continue
        stream = read.found.stream
        whose = stream.series.id, stream.series.account
        for named in (read.origin.stream, *(() if stream.source is None else (stream.source.id,))):
            if billed.setdefault(named, whose) != whose:
                raise NotSettled("the same usage is billed as several things: each is a decision of its own")


async def _checked(connection: Connection, item: Item, read: Reread) -> Reread:
    """What of it may be stored. Raises NotSettled."""
    if read.origin is not None and read.found is not None:
        await _check_elsewhere(connection, item, read.origin, read.found)
        if item.metered and read.found.stream.source is not None and not read.apart:
            await _check_billed(connection, item, read.found)
    if read.batch.evidence and await _dropped(connection, item):
        if read.point is None:
            raise NotSettled(f"{item.id}: spans of its time have been dropped, so it would be dropped too: discard it")
        return replace(read, batch=Batch(points=[read.point]))
    return read


async def _written(connection: Connection, some: Sequence[tuple[Item, Reread]]) -> list[WriteResult]:
    """Raises NotSettled where any of it is not stored."""
    if not some:
        return []
    item, _ = some[0]
    try:
        encoded = [writer.encode(read.batch) for _, read in some]
        results = await writer.write(connection, encoded, Dictionaries())
    except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
        raise NotSettled(f"{item.id}: the database cannot hold it: {str(error).splitlines()[0]}") from None
    for (refused, _), result in zip(some, results, strict=True):
        if result.conflicts:
            raise NotSettled(_contradiction(refused, kind_of(refused), result.conflicts[0].refusal))
    return results


async def _check_billed(connection: Connection, item: Item, point: Point) -> None:
    """Raises NotSettled where this usage was billed to somebody else: by a later total of its source, or as a level or
    an increase that came again."""
    temporality = point.stream.temporality
    where, how = {
        Temporality.LEVEL: (levels.billed_to, "the same level came again"),
        Temporality.CUMULATIVE: (sources.billed_to, "a later total of the same stream holds this one's usage"),
        Temporality.DELTA: (source_streams.billed_to, "the same increase came again"),
    }[temporality]
    there = await where(connection, point)
    if there is not None and there != point.stream.series.account:
        twice = "with this one it would be billed twice. Discard it"
        raise NotSettled(f"{item.id}: {how} and was billed to account {there!r}: {twice}")


async def _dropped(connection: Connection, item: Item) -> bool:
    """True if spans of the item's time have been dropped: one that is added would go as well."""
    if item.time is None:
        return False
    return await (await connection.execute(_DROPPED_SQL, [item.time])).fetchone() is not None


async def _check_elsewhere(connection: Connection, item: Item, came_as: Came, point: Point) -> None:
    arguments = {
        "origin": came_as.stream,
        "point": came_as.point,
        "cumulative": point.stream.temporality is Temporality.CUMULATIVE,
        "series": point.stream.series.id,
        "account": point.stream.series.account,
        "metered": item.metered,
    }
    row = await (await connection.execute(_ELSEWHERE_SQL, arguments)).fetchone()
    if row is None:
        return
    what = "totals of the same stream were" if arguments["cumulative"] else "the same point was"
    raise NotSettled(
        f"{item.id}: {what} billed as something else before, to account {row[1]!r} (item {row[0][: items.ID_SHOWN]}):"
        " with this one, usage would be billed twice. Take the same decision, or discard it"
    )


def _contradiction(item: Item, kind: Kind, refusal: Refusal) -> str:
    what = f"{item.id} stays in quarantine: {refusal.detail}"
    if kind is Kind.DELTA:
        return f"{what}. If it is usage beside that, release it with --additional; if it is the same usage, discard it"
    return f"{what}; discard it"


async def _noted(connection: Connection, item: Item, person: Person, note: _Note) -> Settled:
    read = note.read or Reread(Batch(), {})
    result = note.result or WriteResult()
    changed = {without_nul(name): [_text(v) for v in pair] for name, pair in read.changed.items()}
    arguments = {
        "account": item.account,
        "digest": item.digest,
        "action": note.action,
        "tenant": item.tenant,
        "by": without_nul(person.name),
        "because": without_nul(note.because.strip()),
        "changed": Jsonb(changed),
        "billed_to": read.billed_to,
        "quantity": _quantity(read),
        "inserted": result.inserted,
        "duplicates": result.duplicates,
        "evidence": result.evidence,
        "origin": None if read.origin is None else read.origin.stream,
        "point": None if read.origin is None else read.origin.point,
        "series": None if read.point is None else read.point.stream.series.id,
    }
    await connection.execute(_NOTE_SQL, arguments)
    action = await items.last_action(connection, item)
    assert action is not None, "it was written above"
    return Settled(item, action, done_now=True)


def _quantity(read: Reread) -> Decimal | None:
    if read.point is not None:
        return read.point.value
    quantities: Sequence[Decimal] = [found.quantity for found in read.batch.evidence]
    return quantities[0] if len(quantities) == 1 else None


def _text(value: str | None) -> str | None:
    return None if value is None else without_nul(value)
