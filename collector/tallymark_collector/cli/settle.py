"""`tallymark quarantine release | attribute | discard | reopen`: many items at a time, in transactions of some each."""

from __future__ import annotations

import asyncio
import getpass
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import typer

from tallymark_collector.access.records import check_tenant
from tallymark_collector.cli import opening, output
from tallymark_collector.cli.arguments import (
    AccountOption,
    DatabaseOption,
    JsonOption,
    MetersOption,
    NoRedactionOption,
    RedactOption,
    TenantOption,
    read_meters,
    redaction_of,
)
from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.metering import Rules
from tallymark_collector.model import Reason
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.validation import MAX_METER_LENGTH, MAX_UNIT_LENGTH
from tallymark_collector.quarantine import items, settling
from tallymark_collector.quarantine.items import Action, Filter
from tallymark_collector.quarantine.mending import Decision
from tallymark_collector.quarantine.rules import Kind, rule
from tallymark_collector.quarantine.settling import Deciding, NotSettled, Person
from tallymark_collector.settings import DEFAULT_TENANT
from tallymark_collector.store import Store

MAX_SENTENCES: Final = 20
"""Items that were left as they were, as a summary tells of them one by one."""

READ_AT_ONCE: Final = 100
"""Items that are read before they are settled; an item may be as large as a request."""

MeterOption = Annotated[str | None, typer.Option("--meter", metavar="METER", help="Only this meter.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", metavar="REASON", help="Only this reason.")]
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Items by their ids, or how these begin.")
]
OfAccountOption = Annotated[
    str | None, typer.Option("--of-account", metavar="ACCOUNT", help="Only what names this account; '' for none.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Everything that is open and fits the other options.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask, where no ids are given.")]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by", envvar="TALLYMARK_BY", metavar="NAME", help="Who decides, for the trail.", show_default="the login name"
    ),
]
BecauseOption = Annotated[str, typer.Option("--because", metavar="TEXT", help="Why, for the trail.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also what lies in the future.")]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        "--drop", metavar="ATTRIBUTE", help="Bill it without this attribute; again for more; '' for unreadable ones."
    ),
]
AdditionalOption = Annotated[
    bool, typer.Option("--additional", help="It is usage beside what is stored for the same stream and interval.")
]

Work: TypeAlias = Callable[[], Deciding]
"""What is done with items, as of now."""


@dataclass(slots=True)
class _Outcome:
    """What became of the items that were meant."""

    done: list[Action] = field(default_factory=list)
    before: list[Action] = field(default_factory=list)
    """What somebody had done with items that were closed already."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Ids, each with why."""
    error: StoreUnavailable | None = None
    left: int = 0
    """Items that were not looked at any more."""

    @property
    def seen(self) -> int:
        """Items that were looked at."""
        return len(self.done) + len(self.before) + len(self.refused)


@dataclass(frozen=True, slots=True)
class _Meant:
    """Which items a person means."""

    ids: Sequence[str]
    wanted: Filter
    yes: bool


class _With(NamedTuple):
    """What items are read with, as `serve` is told it."""

    rules: Rules | None
    redaction: Redaction


def release(
    ids: IdsArgument = None,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    meters: MetersOption = None,
    reason: ReasonOption = None,
    meter: MeterOption = None,
    of_account: AccountOption = None,
    everything: AllOption = False,
    additional: AdditionalOption = False,
    force: ForceOption = False,
    drop: DropOption = None,
    meter_name: Annotated[
        str | None, typer.Option("--meter-name", metavar="METER", help="Bill it as this meter: its own is invalid.")
    ] = None,
    unit: Annotated[str | None, typer.Option(metavar="UNIT", help="Bill it in this unit: its own is invalid.")] = None,
    redact: RedactOption = None,
    no_redaction: NoRedactionOption = False,
    by: ByOption = None,
    because: BecauseOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bill items after all. Sent again later, they are counted once.

    Exit status 1 if any item was left as it was. See docs/quarantine.md for what a release does, reason by reason.
    """
    if meter_name is not None and not 0 < len(meter_name) <= MAX_METER_LENGTH:
        raise UserError(f"--meter-name has 1 to {MAX_METER_LENGTH} characters")
    if unit is not None and len(unit) > MAX_UNIT_LENGTH:
        raise UserError(f"--unit has at most {MAX_UNIT_LENGTH} characters")
    for text, option in ((meter_name, "--meter-name"), (unit, "--unit")):
        _text(text or "", option)
    decision = Decision(meter=meter_name, unit=unit, drop=tuple(drop or ()), additional=additional, force=force)
    meant = _meant(ids, Filter(tenant, of_account, meter, reason_named(reason)), everything, yes)
    rules = None if meters is None else read_meters(meters)
    _check_reason(meant, decision, rules)
    given = _With(rules, redaction_of(redact, off=no_redaction))
    _bill(database, meant, decision, given, signed(by, because), "release", as_json)


def attribute(
    account: Annotated[str, typer.Option("--account", metavar="ACCOUNT", help="Bill it to this account.")],
    ids: IdsArgument = None,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    meters: MetersOption = None,
    reason: ReasonOption = None,
    meter: MeterOption = None,
    of_account: OfAccountOption = None,
    everything: AllOption = False,
    additional: AdditionalOption = False,
    force: ForceOption = False,
    drop: DropOption = None,
    redact: RedactOption = None,
    no_redaction: NoRedactionOption = False,
    by: ByOption = None,
    because: BecauseOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bill items that name no account, or none that could be one, to an account.

    Exit status 1 if any item was left as it was.
    """
    decision = Decision(account=_text(account, "--account"), drop=tuple(drop or ()), additional=additional, force=force)
    meant = _meant(ids, Filter(tenant, of_account, meter, reason_named(reason)), everything, yes)
    rules = None if meters is None else read_meters(meters)
    _check_reason(meant, decision, rules)
    given = _With(rules, redaction_of(redact, off=no_redaction))
    _bill(database, meant, decision, given, signed(by, because), f"attribute to account {account!r}", as_json)


def discard(
    because: Annotated[str, typer.Option("--because", metavar="TEXT", help="Why it is not to be billed.")],
    ids: IdsArgument = None,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    reason: ReasonOption = None,
    meter: MeterOption = None,
    of_account: AccountOption = None,
    everything: AllOption = False,
    by: ByOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Close items without billing them; they are kept, and `reopen` undoes it.

    Exit status 1 if any item was left as it was.
    """
    if not because.strip():
        raise UserError("--because is empty: say why these are not to be billed")
    meant = _meant(ids, Filter(tenant, of_account, meter, reason_named(reason)), everything, yes)
    person = signed(by, because)
    _run(database, meant, lambda: settling.discarding(person), "discard", as_json)


def reopen(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Items by their ids, or how these begin.")],
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    by: ByOption = None,
    because: BecauseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Undo a discard. What was billed stays billed."""
    person = signed(by, because)
    meant = _Meant(ids, Filter(tenant), yes=True)
    _run(database, meant, lambda: settling.reopening(person), "reopen", as_json)


def reason_named(text: str | None) -> str | None:
    """A reason as the database has it. Raises UserError where it is none."""
    if text is None:
        return None
    known = [reason.value for reason in Reason]
    if text.lower() not in known:
        raise UserError(f"--reason {text!r} is none: {', '.join(known)}")
    return text.lower()


def _meant(ids: list[str] | None, wanted: Filter, everything: bool, yes: bool) -> _Meant:
    filters = (wanted.account, wanted.meter, wanted.reason)
    if ids and (everything or any(given is not None for given in filters)):
        raise UserError("give ids, or options that say which items: both together are ambiguous")
    if not ids and not everything and all(given is None for given in filters):
        raise UserError("say which items: ids, --reason, --meter, --account, or --all")
    return _Meant(ids or (), wanted, yes)


def _check_reason(meant: _Meant, decision: Decision, rules: Rules | None) -> None:
    """Raises UserError where a whole reason cannot be released so: better one sentence than a thousand."""
    if meant.wanted.reason is None:
        return
    found = rule(meant.wanted.reason, metered=rules is not None)
    if all(found.refusal(kind) for kind in Kind):
        raise UserError(f"{meant.wanted.reason} cannot be released: {found.refusal(Kind.DELTA)}")
    if found.needs and not found.needs & decision.options():
        named = " or ".join(sorted(option.value for option in found.needs))
        raise UserError(f"{meant.wanted.reason} needs a decision, {named}: release {found.release}")


def signed(by: str | None, because: str) -> Person:
    """Who decides, by default who is logged in, and why. Raises UserError."""
    name = (by or "").strip()
    if not name:
        try:
            name = getpass.getuser()
        except (OSError, KeyError):
            raise UserError("this process has no login name: say who decides with --by NAME (TALLYMARK_BY)") from None
    return Person(_text(name, "--by"), _text(because, "--because"))


def _text(text: str, option: str) -> str:
    """The text. Raises UserError where it is none: a shell hands on whatever bytes it was given."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} is not UTF-8") from None
    return text


def _bill(
    database: str | None,
    meant: _Meant,
    decision: Decision,
    given: _With,
    person: Person,
    what: str,
    as_json: bool,
) -> None:
    def work() -> Deciding:
        return settling.releasing(decision, person, time.time_ns(), given.rules, given.redaction)

    _run(database, meant, work, what, as_json)


def _run(database: str | None, meant: _Meant, work: Work, what: str, as_json: bool) -> None:
    outcome = asyncio.run(_outcome(opening.named(database), meant, work, what))
    if outcome is None:
        output.tell("nothing was done")
        return
    _report(outcome, what, as_json)
    if outcome.error is not None:
        output.fail(f"{outcome.error}; {outcome.left:,} items are as they were: run the same again to go on")
        raise typer.Exit(3)
    if outcome.refused or outcome.before:
        raise typer.Exit(1)


async def _outcome(database: str, meant: _Meant, work: Work, what: str) -> _Outcome | None:
    """What became of the items that are meant; None where the person said no."""
    async with opening.opened(database) as store:
        with output.progress("looking for items"):
            ids = await _ids(store, meant)
        if not meant.ids and ids and not _confirmed(meant, what, len(ids)):
            return None
        with output.progress(what) as saying:
            return await _settle(store, meant.wanted.tenant, ids, work, saying)


def _confirmed(meant: _Meant, what: str, count: int) -> bool:
    if meant.yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{what} {count:,} items: give --yes to do so without being asked")
    return typer.confirm(f"{what} {count:,} items?", err=True)


async def _ids(store: Store, meant: _Meant) -> list[str]:
    async with store.reading() as connection:
        await check_tenant(connection, meant.wanted.tenant)
        if meant.ids:
            # All of them first: a mistyped one stops the command before anything is done.
            found = [await items.find_id(connection, meant.wanted.tenant, prefix) for prefix in meant.ids]
            return list(dict.fromkeys(found))
        return await items.open_ids(connection, meant.wanted)


async def _settle(store: Store, tenant: str, ids: Sequence[str], work: Work, saying: output.Saying) -> _Outcome:
    outcome = _Outcome()
    try:
        for first in range(0, len(ids), READ_AT_ONCE):
            async with store.reading() as connection:
                found = [await items.read(connection, tenant, each) for each in ids[first : first + READ_AT_ONCE]]
            async for item, settled in settling.together(store, found, work()):
                if isinstance(settled, NotSettled):
                    outcome.refused.append((item.id, str(settled)))
                else:
                    (outcome.done if settled.done_now else outcome.before).append(settled.action)
                saying(f"{outcome.seen:,} of {len(ids):,} items")
    except StoreUnavailable as error:
        outcome.error, outcome.left = error, len(ids) - outcome.seen
    return outcome


def _report(outcome: _Outcome, what: str, as_json: bool) -> None:
    if as_json:
        output.write_json(
            {
                "done": [action._asdict() for action in outcome.done],
                "already": [action._asdict() for action in outcome.before],
                "refused": [{"id": item_id, "why": why} for item_id, why in outcome.refused],
                "left": outcome.left,
            }
        )
        return
    counts: dict[str, Any] = {
        "items": len(outcome.done),
        "points that are new": sum(action.inserted for action in outcome.done),
        "points that were there": sum(action.duplicates for action in outcome.done),
        "spans that are new": sum(action.evidence for action in outcome.done),
    }
    output.say(f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for action in outcome.before[:MAX_SENTENCES]:
        output.warn(f"{action.id[: items.ID_SHOWN]} was {action.sentence()}")
    for _, why in outcome.refused[:MAX_SENTENCES]:
        output.warn(why)
    more = max(0, len(outcome.before) - MAX_SENTENCES) + max(0, len(outcome.refused) - MAX_SENTENCES)
    if more:
        output.warn(f"and {more:,} others were left as they were; --json tells all")
