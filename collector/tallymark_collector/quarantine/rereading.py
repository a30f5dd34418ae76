"""What items come to as usage when they are read again, the way of every request. Plain functions: value in, value out;
what the database knows of them is asked in `settling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final
from uuid import UUID

from tallymark_collector.errors import MalformedRequest, UserError
from tallymark_collector.metering import Rules
from tallymark_collector.model import Batch, Point, Reason, Refusal, Temporality, cause, fingerprint
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.sent import Came
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits, account_name
from tallymark_collector.quarantine import items, reading
from tallymark_collector.quarantine.items import Item
from tallymark_collector.quarantine.mending import Decision, Mended, mend, named_account, origin
from tallymark_collector.quarantine.metered import read_metered
from tallymark_collector.quarantine.rules import Kind, Option, rule

FAR: Final = timedelta(days=365 * 1000)
"""Past every time that OTLP can write."""


class NotSettled(UserError):  # noqa: N818 - nothing went wrong: it was not done
    """The item stays as it was; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Reread:
    """What an item's payload comes to."""

    batch: Batch
    changed: Mapping[str, tuple[str | None, str | None]]
    origin: Came | None = None
    found: Point | None = None
    """Its point under the identity that a request would give it."""
    point: Point | None = None
    """The same as it is billed."""
    billed_to: str | None = None

    @property
    def apart(self) -> bool:
        """True if it has an identity of its own."""
        return self.point is not self.found


def kind_of(item: Item) -> Kind:
    """What the item's payload is."""
    return reading.read(item.signal, item.payload, metered=item.metered).kind


def check(item: Item, decision: Decision) -> None:
    """Raises NotSettled where what was decided makes no sense for the item."""
    found, kind = rule(item.reason, metered=item.metered), kind_of(item)
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


def reread(item: Item, decision: Decision, rules: Rules | None, now_ns: int, redaction: Redaction = STANDARD) -> Reread:
    """What the item comes to by that decision. Raises NotSettled."""
    # Of what lacks an account, too, the clock may have been set back.
    reversible = kind_of(item) in (Kind.DELTA, Kind.LEVEL, Kind.SPAN, Kind.USAGE_SPAN)
    decision = replace(decision, start_is_end=reversible)
    try:
        if item.metered:
            return _metered(item, decision, rules, now_ns, redaction)
        return _sent(item, decision, now_ns, redaction)
    except MalformedRequest as error:
        raise NotSettled(f"{item.id}: its payload cannot be read: {error}") from None


def _check_nameless(item: Item, decision: Decision) -> None:
    """Raises NotSettled where usage of one account would become another's, MalformedRequest."""
    if decision.account is None or item.signal != "metrics":
        return  # of a span, only the parts that name no account are given one
    named = item.account or named_account(item.payload)
    if named is not None:
        raise NotSettled(f"{item.id} names account {named!r} itself: its usage cannot become another's")


def _limits(decision: Decision) -> TimeLimits:
    # However long ago: whether it can be told from a replay, the database knows (`usage_kept`).
    return TimeLimits(ahead=FAR if decision.force else TimeLimits().ahead, retention=FAR)


def _metered(item: Item, decision: Decision, rules: Rules | None, now_ns: int, redaction: Redaction) -> Reread:
    found = read_metered(item, decision, rules, _limits(decision), now_ns, redaction)
    if isinstance(found, str):
        raise NotSettled(f"{item.id}: {found}")
    point = _own(found.point, found.origin, additional=decision.additional) if found.apart else found.point
    batch = Batch(points=[point], evidence=found.evidence)
    return Reread(batch, found.changed, found.origin, found.point, point, point.stream.series.account)


def _sent(item: Item, decision: Decision, now_ns: int, redaction: Redaction) -> Reread:
    _check_nameless(item, decision)
    mended = mend(item.signal, item.payload, decision)
    limits = _limits(decision)
    if item.signal == "traces":
        return _spans(item, mended, limits, now_ns, redaction)
    cache = StreamCache(redaction=redaction, kept=True)
    decoded = decode_metrics(item.tenant, mended.payload, cache, limits, now_ns)
    if decoded.quarantined:
        raise NotSettled(_still(item, decoded.quarantined[0].refusal))
    batch = Batch(controls=decoded.controls, closings=decoded.closings, counts=decoded.counts)
    if not decoded.points:
        if not batch:
            raise NotSettled(f"{item.id}: there is nothing in it that this version takes for usage")
        return Reread(batch, mended.changed)
    if len(decoded.points) > 1:
        raise NotSettled(f"{item.id}: there are {len(decoded.points)} points in it, and each is a decision of its own")
    [found] = decoded.points
    came_as = origin(item.tenant, item.payload)
    point = found
    if mended.changed or decision.additional:
        point = _own(found, came_as, additional=decision.additional)
    return Reread(Batch(points=[point]), mended.changed, came_as, found, point, found.stream.series.account)


def _spans(item: Item, mended: Mended, limits: TimeLimits, now_ns: int, redaction: Redaction) -> Reread:
    decoded = decode_spans(item.tenant, mended.payload, limits, now_ns, redaction=redaction, kept=True)
    # What else is wrong with the span is an item of its own.
    for kept in decoded.quarantined:
        if kept.refusal.reason.value == item.reason or not decoded.evidence:
            raise NotSettled(_still(item, kept.refusal))
    if not decoded.evidence:
        raise NotSettled(f"{item.id}: there is nothing in it that this version takes for evidence")
    accounts = {found.account for found in decoded.evidence}
    account = accounts.pop() if len(accounts) == 1 else None
    return Reread(Batch(evidence=decoded.evidence), mended.changed, billed_to=account)


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
