"""`tallymark.v1.QuarantineService`: what could not be billed, listed, explained and settled by its tenant."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from tallymark.v1 import quarantine_pb2 as pb
from tallymark_collector.access import Principal, records
from tallymark_collector.api import values
from tallymark_collector.api.calls import Method
from tallymark_collector.api.reading import Readers
from tallymark_collector.errors import NotPossible, UserError
from tallymark_collector.metering import Rules
from tallymark_collector.model import Reason
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.validation import MAX_METER_LENGTH, MAX_UNIT_LENGTH
from tallymark_collector.quarantine import items, reading, settling
from tallymark_collector.quarantine.items import Filter
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.rules import rule
from tallymark_collector.quarantine.settling import NotSettled, Person, Settled
from tallymark_collector.query.pages import PAGE_BYTES
from tallymark_collector.store.database import Connection

NAME: Final = "tallymark.v1.QuarantineService"
PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000
MAX_HISTORY: Final = 100
MAX_BECAUSE: Final = 1_000
"""Characters of a reason that somebody gives."""
MAX_PAYLOAD: Final = 256 * 1024
"""Bytes of an item that is read here: a larger one would hold up those who send usage."""
MAX_TEXT: Final = 4_096
"""Characters of a text of an item; longer ones end in an ellipsis."""

_WHOLE_ID: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


class ReadWith(NamedTuple):
    """What items are read with: the same as what the collector takes usage with."""

    rules: Rules | None
    redaction: Redaction


def methods(readers: Readers, read_with: ReadWith) -> list[Method[Any]]:
    """The service's methods."""

    async def list_(principal: Principal, request: pb.ListItemsRequest) -> pb.ListItemsResponse:
        principal.check_read(principal.tenant)
        wanted = Filter(
            principal.tenant,
            request.account if request.HasField("account") else None,
            request.meter or None,
            _reason(request.reason) if request.reason else None,
        )
        size = values.page_size(request.page_size, PAGE_SIZE, MAX_PAGE_SIZE)
        after = values.page_after(request, 2)
        async with readers.reading(principal) as connection:
            found = await items.open_items(connection, wanted, size + 1, None if after is None else _place(*after))
            counts = await items.summary(connection, wanted)
        return _page(request, found, size, counts)

    async def get(principal: Principal, request: pb.GetItemRequest) -> pb.Item:
        principal.check_read(principal.tenant)
        async with readers.reading(principal) as connection:
            item = await _find(connection, principal.tenant, request.id)
            done = await items.history(connection, principal.tenant, item, MAX_HISTORY)
        return _explained(item, done)

    async def release(principal: Principal, request: pb.ReleaseItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        decision = _decision(request)
        return await settled(
            principal,
            request.id,
            lambda item: settling.release(readers.store, item, decision, person, time.time_ns(), *read_with),
        )

    async def discard(principal: Principal, request: pb.DiscardItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        if not person.because:
            raise UserError("because is empty: say why this is not to be billed")
        return await settled(principal, request.id, lambda item: settling.discard(readers.store, item, person))

    async def reopen(principal: Principal, request: pb.ReopenItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        return await settled(principal, request.id, lambda item: settling.reopen(readers.store, item, person))

    async def settled(
        principal: Principal, item_id: str, work: Callable[[items.Item], Awaitable[Settled]]
    ) -> pb.Settlement:
        if not _WHOLE_ID.fullmatch(item_id):
            raise UserError("id: give all 32 hexadecimal digits of the item that you decide about")
        async with readers.turn(principal, administers=True):
            async with readers.store.reading() as connection:
                await records.check_live(connection, principal)
                item = await _find(connection, principal.tenant, item_id)
            try:
                done = await work(item)
            except NotSettled as error:
                raise NotPossible(str(error)) from None
        return pb.Settlement(action=_action(done.action), done_now=done.done_now)

    return [
        Method("ListItems", pb.ListItemsRequest, list_),
        Method("GetItem", pb.GetItemRequest, get),
        Method("ReleaseItem", pb.ReleaseItemRequest, release, administers=True),
        Method("DiscardItem", pb.DiscardItemRequest, discard, administers=True),
        Method("ReopenItem", pb.ReopenItemRequest, reopen, administers=True),
    ]


async def _find(connection: Connection, tenant: str, item_id: str) -> items.Item:
    """Raises UserError, NotThere, and NotPossible where the item is too large to be read here."""
    whole = await items.find_id(connection, tenant, item_id)
    size = await items.payload_size(connection, tenant, whole)
    if size > MAX_PAYLOAD:
        raise NotPossible(
            f"the item {whole} has {size:,} bytes, at most {MAX_PAYLOAD:,} are read here: use `tallymark quarantine`"
        )
    return await items.read(connection, tenant, whole)


def _person(principal: Principal, because: str) -> Person:
    """Who decides: the credential, for the trail. Raises Forbidden, UserError."""
    principal.check_administer()
    text = because.strip()
    if len(text) > MAX_BECAUSE:
        raise UserError(f"because has at most {MAX_BECAUSE:,} characters")
    return Person(principal.credential, text)


def _decision(request: pb.ReleaseItemRequest) -> Decision:
    meter, unit = request.meter or None, request.unit if request.HasField("unit") else None
    if meter is not None and len(meter) > MAX_METER_LENGTH:
        raise UserError(f"meter has at most {MAX_METER_LENGTH} characters")
    if unit is not None and len(unit) > MAX_UNIT_LENGTH:
        raise UserError(f"unit has at most {MAX_UNIT_LENGTH} characters")
    return Decision(
        account=request.account or None,
        meter=meter,
        unit=unit,
        drop=tuple(request.drop),
        additional=request.additional,
        force=request.force,
    )


def _reason(name: str) -> str:
    known = [reason.value for reason in Reason]
    if name not in known:
        raise UserError(f"reason {name[:64]!r} is none of {', '.join(known)}")
    return name


def _place(recorded_at: str | None, item_id: str | None) -> tuple[datetime, str]:
    """Behind which item a page begins. Raises UserError."""
    try:
        moment = datetime.fromisoformat(recorded_at or "")
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or item_id is None:
        raise UserError("page_token was not given for this question: send none to begin anew")
    return moment, item_id


def _page(
    request: pb.ListItemsRequest, found: list[items.Entry], size: int, counts: Mapping[str, int]
) -> pb.ListItemsResponse:
    page = pb.ListItemsResponse(open=counts)
    bytes_ = 0
    for position, entry in enumerate(found):
        item = _listed(entry)
        bytes_ += item.ByteSize()
        if position and (position == size or bytes_ > PAGE_BYTES):
            last = found[position - 1]
            page.next_page_token = values.page_token(request, [last.recorded_at.isoformat(), last.id])
            break
        page.items.append(item)
    return page


def _listed(entry: items.Entry | items.Item) -> pb.Item:
    return pb.Item(
        id=entry.id,
        account=_cut(entry.account),
        meter=_cut(entry.meter),
        reason=entry.reason,
        detail=_cut(entry.detail),
        signal=entry.signal,
        time=values.timestamp(entry.time),
        record_time=values.timestamp(entry.recorded_at),
    )


def _explained(item: items.Item, done: list[items.Action]) -> pb.Item:
    content = reading.read(item.signal, item.payload, metered=item.metered)
    explained = rule(item.reason, metered=item.metered)
    refusal = explained.refusal(content.kind)
    found = _listed(item)
    for name, text in {"kind": content.kind.value, **content.facts}.items():
        found.content[name] = _cut(text)
    found.meaning, found.remedy = explained.meaning, explained.remedy
    found.refusal = refusal or ""
    found.release = "" if refusal else explained.release
    found.state = items.state(done)
    found.history.extend(map(_action, done))
    return found


def _action(action: items.Action) -> pb.Action:
    return pb.Action(
        action=action.action,
        act_time=values.timestamp(action.acted_at),
        acted_by=_cut(action.acted_by),
        database_user=action.database_user,
        because=_cut(action.because),
        billed_to=action.billed_to or "",
        quantity=None if action.quantity is None else values.digits(action.quantity),
        inserted=action.inserted,
        duplicates=action.duplicates,
        evidence=action.evidence,
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
