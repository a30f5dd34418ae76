"""One item, one transaction: its points and the note of who did what, or neither.

A lock on the item has two people take turns; the second is told what the first did. So a command that was killed may be
run again: what is done is done, with its points, and what is not is open.

What stands between a release and counting twice:

- a point that is released as it was sent keeps its identity: sent again, or accepted before, it is a duplicate;
- one that was changed (an account, another meter) becomes a point of a stream of its own, whose identity is made of
  what was sent and of what it is billed as. The same usage that came in two wrappings is one point;
- usage that was billed as something else before is refused: the trail knows what every action was about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from typing import Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from tallymark_collector.errors import MalformedRequest, UserError
from tallymark_collector.metering import Rules
from tallymark_collector.model import (
    Batch,
    Point,
    Reason,
    Refusal,
    Temporality,
    WriteResult,
    cause,
    fingerprint,
    without_nul,
)
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import Came
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits, account_name
from tallymark_collector.quarantine import items, reading
from tallymark_collector.quarantine.items import Action, Item
from tallymark_collector.quarantine.mending import Decision, Mended, mend, named_account, origin
from tallymark_collector.quarantine.metered import read_metered
from tallymark_collector.quarantine.rules import Kind, Option, Rule, rule
from tallymark_collector.store import Store, levels, locks, source_streams, sources, writer
from tallymark_collector.store.database import Connection
from tallymark_collector.store.dictionaries import Dictionaries

FAR: Final = timedelta(days=365 * 1000)
"""Past every time that OTLP can write."""


class NotSettled(UserError):  # noqa: N818 - nothing went wrong: it was not done
    """The item stays as it was; the text says why and what to do."""


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


class _Read(NamedTuple):
    """What an item's payload comes to."""

    batch: Batch
    origin: Came | None
    point: Point | None
    billed_to: str | None
    changed: dict[str, tuple[str | None, str | None]]


class _Note(NamedTuple):
    """A row of quarantine_action."""

    action: str
    because: str
    changed: dict[str, tuple[str | None, str | None]] | None = None
    read: _Read | None = None
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
    found = rule(item.reason, metered=item.metered)
    kind = reading.read(item.signal, item.payload, metered=item.metered).kind
    _check(item, found, kind, decision)
    # Of what lacks an account, too, the clock may have been set back.
    decision = replace(decision, start_is_end=kind in (Kind.DELTA, Kind.LEVEL, Kind.SPAN, Kind.USAGE_SPAN))

    async def work(connection: Connection) -> Settled:
        last = await _taken(connection, item)
        if last is not None and last.action != "reopened":
            return Settled(item, last, done_now=False)
        try:
            if item.metered:
                read = await _read_metered(connection, item, decision, rules, now_ns, redaction)
            else:
                read = await _read(connection, item, decision, now_ns, redaction)
        except MalformedRequest as error:
            raise NotSettled(f"{item.id}: its payload cannot be read: {error}") from None
        try:
            [result] = await writer.write(connection, [writer.encode(read.batch)], Dictionaries())
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
            raise NotSettled(f"{item.id}: the database cannot hold it: {str(error).splitlines()[0]}") from None
        if result.conflicts:
            raise NotSettled(_contradiction(item, kind, result.conflicts[0].refusal))
        action = "attributed" if decision.account is not None else "released"
        return await _noted(connection, item, person, _Note(action, person.because, read.changed, read, result))

    return await store.settle(work)


async def discard(store: Store, item: Item, person: Person) -> Settled:
    """Closes an item without billing it; its payload is kept. Raises NotSettled, StoreUnavailable."""
    if not person.because.strip():
        raise NotSettled("say why it is not to be billed: --because TEXT")

    async def work(connection: Connection) -> Settled:
        last = await _taken(connection, item)
        if last is not None and last.action != "reopened":
            return Settled(item, last, done_now=False)
        return await _noted(connection, item, person, _Note("discarded", person.because))

    return await store.settle(work)


async def reopen(store: Store, item: Item, person: Person) -> Settled:
    """Undoes a discard; an item that is open already stays so. Raises NotSettled for what was billed: that would
    bill it again. Raises StoreUnavailable."""

    async def work(connection: Connection) -> Settled:
        last = await _taken(connection, item)
        # Whoever drops points of its time sees it open, or has dropped them by now.
        await locks.shared(connection, locks.KEPT)
        if last is None:
            raise NotSettled(f"{item.id} is open: nothing was done with it yet")
        if last.action == "reopened":
            return Settled(item, last, done_now=False)
        if last.action != "discarded":
            raise NotSettled(f"{item.id} cannot be opened again, it is billed: {last.sentence()}")
        return await _noted(connection, item, person, _Note("reopened", person.because))

    return await store.settle(work)


def _check(item: Item, found: Rule, kind: Kind, decision: Decision) -> None:
    """Raises NotSettled where what was decided makes no sense for the item."""
    if (why := found.refusal(kind)) is not None:
        raise NotSettled(
            f"{item.id} ({item.reason}) cannot be released: {why}; `tallymark quarantine discard` closes it"
        )
    given = decision.options()
    content = {Option.ACCOUNT, Option.METER, Option.UNIT, Option.DROP, Option.ADDITIONAL}
    if unfit := sorted(o.value for o in given if not found.allows(o) or (kind is Kind.CONTROL and o in content)):
        raise NotSettled(f"{item.id} ({item.reason}): {', '.join(unfit)} changes nothing about why it is here")
    if found.needs and not found.needs & given:
        named = " or ".join(sorted(option.value for option in found.needs))
        how = f"`tallymark quarantine attribute {item.id[: items.ID_SHOWN]} --account ACCOUNT`"
        hint = f" ({how})" if Option.ACCOUNT in found.needs else ""
        raise NotSettled(f"{item.id} ({item.reason}) needs a decision: {named}{hint}; release {found.release}")
    if decision.account is not None and account_name(decision.account) is None:
        raise NotSettled(f"{decision.account!r} is no account's name: 1 to 256 characters, none NUL")
    if decision.additional and kind is not Kind.DELTA:
        raise NotSettled(f"{item.id} is a {kind.value}: only an increase can be additional usage")


def _check_nameless(item: Item, decision: Decision) -> None:
    """Raises NotSettled where usage of one account would become another's, MalformedRequest."""
    if decision.account is None or item.signal != "metrics":
        return  # of a span, only the parts that name no account are given one
    named = item.account or named_account(item.payload)
    if named is not None:
        raise NotSettled(f"{item.id} names account {named!r} itself: its usage cannot become another's")


async def _taken(connection: Connection, item: Item) -> Action | None:
    """The item's last action, once nobody else is at work with it."""
    await locks.taken(connection, f"{locks.QUARANTINE}.{item.id}")
    return await items.last_action(connection, item)


def _limits(decision: Decision) -> TimeLimits:
    # However long ago: whether it can be told from a replay, the database knows (`usage_kept`).
    return TimeLimits(ahead=FAR if decision.force else TimeLimits().ahead, retention=FAR)


async def _read_metered(
    connection: Connection,
    item: Item,
    decision: Decision,
    rules: Rules | None,
    now_ns: int,
    redaction: Redaction,
) -> _Read:
    found = read_metered(item, decision, rules, _limits(decision), now_ns, redaction)
    if isinstance(found, str):
        raise NotSettled(f"{item.id}: {found}")
    await locks.taken(connection, f"{locks.QUARANTINE}.{found.origin.stream}")
    await _check_elsewhere(connection, item, found.origin, found.point)
    if found.point.stream.source is not None and not found.apart:
        await _check_billed(connection, item, found.point)
    point = _own(found.point, found.origin, additional=decision.additional) if found.apart else found.point
    evidence = [] if await _dropped(connection, item) else found.evidence
    batch = Batch(points=[point], evidence=evidence)
    return _Read(batch, found.origin, point, point.stream.series.account, found.changed)


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


async def _read(connection: Connection, item: Item, decision: Decision, now_ns: int, redaction: Redaction) -> _Read:
    _check_nameless(item, decision)
    mended = mend(item.signal, item.payload, decision)
    limits = _limits(decision)
    if item.signal == "traces":
        return await _read_spans(connection, item, mended, limits, now_ns, redaction)
    cache = StreamCache(redaction=redaction, kept=True)
    decoded = decode_metrics(item.tenant, mended.payload, cache, limits, now_ns)
    if decoded.quarantined:
        raise NotSettled(_still(item, decoded.quarantined[0].refusal))
    batch = Batch(controls=decoded.controls, closings=decoded.closings, counts=decoded.counts)
    if not decoded.points:
        if not batch:
            raise NotSettled(f"{item.id}: there is nothing in it that this version takes for usage")
        return _Read(batch, None, None, None, mended.changed)
    if len(decoded.points) > 1:
        raise NotSettled(f"{item.id}: there are {len(decoded.points)} points in it, and each is a decision of its own")
    [point] = decoded.points
    came_as = origin(item.tenant, item.payload)
    series = point.stream.series
    await locks.taken(connection, f"{locks.QUARANTINE}.{came_as.stream}")
    await _check_elsewhere(connection, item, came_as, point)
    if mended.changed or decision.additional:
        point = _own(point, came_as, additional=decision.additional)
    return _Read(Batch(points=[point]), came_as, point, series.account, mended.changed)


async def _read_spans(
    connection: Connection, item: Item, mended: Mended, limits: TimeLimits, now_ns: int, redaction: Redaction
) -> _Read:
    decoded = decode_spans(item.tenant, mended.payload, limits, now_ns, redaction=redaction, kept=True)
    # What else is wrong with the span is an item of its own.
    for kept in decoded.quarantined:
        if kept.refusal.reason.value == item.reason or not decoded.evidence:
            raise NotSettled(_still(item, kept.refusal))
    if not decoded.evidence:
        raise NotSettled(f"{item.id}: there is nothing in it that this version takes for evidence")
    if await _dropped(connection, item):
        raise NotSettled(f"{item.id}: spans of its time have been dropped, so it would be dropped too: discard it")
    accounts = {found.account for found in decoded.evidence}
    account = accounts.pop() if len(accounts) == 1 else None
    return _Read(Batch(evidence=decoded.evidence), None, None, account, mended.changed)


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


def _own(point: Point, came_as: Came, *, additional: bool) -> Point:
    """The point in a stream of its own, by what was sent and what it is billed as. Beside the stream that it came in,
    it is neither a duplicate nor an overlap."""
    stream = point.stream
    told_apart = (str(came_as.point), f"{point.value}") if additional else ()
    own = fingerprint("settled", came_as.stream.hex, stream.series.id.hex, *told_apart)
    if stream.temporality is not Temporality.DELTA:
        # What one origin stands at is one account's at a time, here too.
        whose = own if stream.temporality is Temporality.CUMULATIVE else fingerprint("settled", came_as.stream.hex)
        source = None if stream.source is None else stream.source._replace(id=whose, earlier=None)
        return point._replace(stream=replace(stream, id=own, source=source))
    # Two that start after they end may end at one time: their own start tells them apart.
    return point._replace(stream=replace(stream, id=own, source=None), cause=_part(came_as.point))


def _part(point: UUID) -> int:
    return cause(point.int >> 64, point.int & (2**64 - 1), "settled")


def _still(item: Item, refusal: Refusal) -> str:
    hint = " (or --force)" if refusal.reason is Reason.TIME_AHEAD else ""
    return f"{item.id} stays in quarantine: {refusal.reason.value}: {refusal.detail}{hint}"


def _contradiction(item: Item, kind: Kind, refusal: Refusal) -> str:
    what = f"{item.id} stays in quarantine: {refusal.detail}"
    if kind is Kind.DELTA:
        return f"{what}. If it is usage beside that, release it with --additional; if it is the same usage, discard it"
    return f"{what}; discard it"


async def _noted(connection: Connection, item: Item, person: Person, note: _Note) -> Settled:
    read = note.read or _Read(Batch(), None, None, None, {})
    result = note.result or WriteResult()
    changed = {without_nul(name): [_text(v) for v in pair] for name, pair in (note.changed or {}).items()}
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


def _quantity(read: _Read) -> Decimal | None:
    if read.point is not None:
        return read.point.value
    quantities: Sequence[Decimal] = [found.quantity for found in read.batch.evidence]
    return quantities[0] if len(quantities) == 1 else None


def _text(value: str | None) -> str | None:
    return None if value is None else without_nul(value)
