"""`tallymark.v1.QuarantineService`: what could not be billed, listed, explained and settled by its tenant."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from tallymark.v1 import quarantine_pb2 as pb
from tallymark_collector.access import Principal
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

NAME: Final = "tallymark.v1.QuarantineService"
PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000
MAX_HISTORY: Final = 100
MAX_BECAUSE: Final = 1_000
"""Characters of a reason that somebody gives."""


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
        async with readers.reading(principal.tenant) as connection:
            found = await items.open_items(connection, wanted, size)
            counts = await items.summary(connection, wanted)
        return pb.ListItemsResponse(items=map(_listed, found), open=counts)

    async def get(principal: Principal, request: pb.GetItemRequest) -> pb.Item:
        principal.check_read(principal.tenant)
        async with readers.reading(principal.tenant) as connection:
            item = await items.find(connection, principal.tenant, request.id)
            done = await items.history(connection, principal.tenant, item, MAX_HISTORY)
        return _explained(item, done)

    async def release(principal: Principal, request: pb.ReleaseItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        decision = _decision(request)
        return await _settled(
            principal,
            request.id,
            lambda item: settling.release(readers.store, item, decision, person, time.time_ns(), *read_with),
        )

    async def discard(principal: Principal, request: pb.DiscardItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        if not person.because:
            raise UserError("because is empty: say why this is not to be billed")
        return await _settled(principal, request.id, lambda item: settling.discard(readers.store, item, person))

    async def reopen(principal: Principal, request: pb.ReopenItemRequest) -> pb.Settlement:
        person = _person(principal, request.because)
        return await _settled(principal, request.id, lambda item: settling.reopen(readers.store, item, person))

    async def _settled(
        principal: Principal, prefix: str, work: Callable[[items.Item], Awaitable[Settled]]
    ) -> pb.Settlement:
        async with readers.turn(principal.tenant):
            async with readers.store.reading() as connection:
                item = await items.find(connection, principal.tenant, prefix)
            try:
                settled = await work(item)
            except NotSettled as error:
                raise NotPossible(str(error)) from None
        return pb.Settlement(action=_action(settled.action), done_now=settled.done_now)

    return [
        Method("ListItems", pb.ListItemsRequest, list_),
        Method("GetItem", pb.GetItemRequest, get),
        Method("ReleaseItem", pb.ReleaseItemRequest, release),
        Method("DiscardItem", pb.DiscardItemRequest, discard),
        Method("ReopenItem", pb.ReopenItemRequest, reopen),
    ]


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


def _listed(entry: items.Entry | items.Item) -> pb.Item:
    return pb.Item(
        id=entry.id,
        account=entry.account,
        meter=entry.meter,
        reason=entry.reason,
        detail=entry.detail,
        signal=entry.signal,
        time=values.timestamp(entry.time),
        record_time=values.timestamp(entry.recorded_at),
    )


def _explained(item: items.Item, done: list[items.Action]) -> pb.Item:
    content = reading.read(item.signal, item.payload, metered=item.metered)
    explained = rule(item.reason, metered=item.metered)
    refusal = explained.refusal(content.kind)
    found = _listed(item)
    found.content.update({"kind": content.kind.value, **content.facts})
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
        acted_by=action.acted_by,
        database_user=action.database_user,
        because=action.because,
        billed_to=action.billed_to or "",
        quantity=None if action.quantity is None else values.digits(action.quantity),
        inserted=action.inserted,
        duplicates=action.duplicates,
        evidence=action.evidence,
    )
