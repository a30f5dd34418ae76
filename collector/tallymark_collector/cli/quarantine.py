"""`tallymark quarantine`: what could not be billed, as a queue: listed and explained here, settled in `cli.settle`."""

from __future__ import annotations

import asyncio
from datetime import date, datetime, timezone
from typing import Annotated, Any

import typer

from tallymark_collector.access.records import check_tenant
from tallymark_collector.cli import opening, output, settle
from tallymark_collector.cli.arguments import (
    AccountOption,
    DatabaseOption,
    JsonOption,
    MetersOption,
    TenantOption,
    day_or_instant,
    read_meters,
)
from tallymark_collector.cli.settle import MeterOption, ReasonOption
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering import Rules
from tallymark_collector.metering.explain import Item as Explained
from tallymark_collector.quarantine import contradictions, items, metered, reading
from tallymark_collector.quarantine.contradictions import Affected, Stored
from tallymark_collector.quarantine.items import Action, Entry, Filter, Item
from tallymark_collector.quarantine.reading import Content
from tallymark_collector.quarantine.rules import Kind, rule
from tallymark_collector.settings import DEFAULT_TENANT

commands = typer.Typer(
    no_args_is_help=True, help="Work through what could not be billed: explain, release, attribute or discard it."
)

_LIMIT = 100

LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="NUMBER", help="Show so many at most.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The item's id, or how it begins.")]


@commands.command("list")
def list_(
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    account: AccountOption = None,
    meter: MeterOption = None,
    reason: ReasonOption = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only what arrived then (UTC) or later.")
    ] = None,
    limit: LimitOption = _LIMIT,
    as_json: JsonOption = False,
) -> None:
    """List what is open, the oldest first, and how many of each reason there are.

    --account '' lists what names no account.
    """
    wanted = Filter(tenant, account, meter, settle.reason_named(reason), _since(since))
    found, counts = asyncio.run(_list(opening.named(database), wanted, limit))
    if as_json:
        output.write_json({"open": sum(counts.values()), "reasons": counts, "items": [e._asdict() for e in found]})
        return
    if not found:
        output.say("nothing is open")
        return
    columns = ("id", "time", "account", "meter", "reason", "detail", "arrived")
    output.write_table(columns, [_row(entry) for entry in found])
    output.say("")
    output.write_table(
        ("reason", "open", "release"),
        [(name, count, rule(name).release) for name, count in counts.items()],
        ("open",),
        footer=("total", f"{sum(counts.values()):,}", None),
    )
    if len(found) < sum(counts.values()):
        output.tell(f"{len(found):,} of {sum(counts.values()):,} are shown: see --limit")


@commands.command()
def show(
    item_id: IdArgument,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    meters: MetersOption = None,
    account: Annotated[
        str | None, typer.Option("--account", metavar="ACCOUNT", help="Whose period it would change.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain an item: why it is here, what it says, what is stored that it contradicts, what can be done.

    With --meters also what each meter of that file would make of it, and why.
    """
    rules = None if meters is None else read_meters(meters)
    found, stored, periods, done = asyncio.run(_show(opening.named(database), tenant, item_id, account, rules))
    content = reading.read(found.signal, found.payload, metered=found.metered)
    by_file = None if rules is None else _by_file(found, rules)
    if as_json:
        output.write_json(_document(found, content, stored, periods, done, by_file))
        return
    explained = rule(found.reason, metered=found.metered)
    output.write_facts(
        {
            "id": found.id,
            "state": _state(done),
            "account": found.account or "(none)",
            "meter": f"{found.meter}{', by a file of meters' if found.metered else ''}" or "(several)",
            "reason": found.reason,
            "detail": found.detail,
            "arrived": found.recorded_at,
            "what it is": content.kind.value,
            **content.facts,
        }
    )
    output.say("")
    output.say(f"What this means. {explained.meaning}")
    output.say(f"So that no more comes: {explained.remedy}.")
    for one in stored:
        when = "" if one.recorded_at is None else f", written {output.iso(one.recorded_at)}"
        output.say(f"Stored for {one.what}: {one.quantity:f}{when}.")
    for period in periods:
        output.say(_period_text(period))
    if by_file is not None:
        output.say("")
        output.say(f"By {meters}:")
        columns = ("meter", "outcome", "account", "quantity", "why")
        rows = [(one.meter, one.outcome, one.account, one.quantity, one.why) for one in by_file]
        output.write_table(columns, rows, ("quantity",))
    output.say("")
    for sentence in _ways(found, content.kind, done):
        output.say(sentence)
    if done:
        output.say("")
        _write_history(done)


@commands.command()
def history(
    item_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One item, or how its id begins.")] = None,
    database: DatabaseOption = None,
    tenant: TenantOption = DEFAULT_TENANT,
    limit: LimitOption = _LIMIT,
    as_json: JsonOption = False,
) -> None:
    """Show who did what, when and why, the latest first."""
    done = asyncio.run(_history(opening.named(database), tenant, item_id, limit))
    if as_json:
        output.write_json([action._asdict() for action in done])
    elif done:
        _write_history(done)
    else:
        output.say("nothing was done yet")


commands.command()(settle.release)
commands.command()(settle.attribute)
commands.command()(settle.discard)
commands.command()(settle.reopen)


async def _list(database: str, wanted: Filter, limit: int) -> tuple[list[Entry], dict[str, int]]:
    async with opening.opened(database) as store, store.reading() as connection:
        await check_tenant(connection, wanted.tenant)
        return await items.open_items(connection, wanted, limit), dict(await items.summary(connection, wanted))


def _by_file(found: Item, rules: Rules) -> list[Explained]:
    try:
        return metered.explained(found, rules)
    except MalformedRequest as error:
        return [Explained(found.id, found.signal, "", "not readable", why=str(error))]


async def _show(
    database: str, tenant: str, prefix: str, account: str | None, rules: Rules | None
) -> tuple[Item, list[Stored], list[Affected], list[Action]]:
    async with opening.opened(database) as store, store.reading() as connection:
        await check_tenant(connection, tenant)
        found = await items.find(connection, tenant, prefix)
        return (
            found,
            await contradictions.stored(connection, found, rules),
            await contradictions.affected(connection, found, account),
            await items.history(connection, tenant, found, None),
        )


async def _history(database: str, tenant: str, prefix: str | None, limit: int) -> list[Action]:
    async with opening.opened(database) as store, store.reading() as connection:
        await check_tenant(connection, tenant)
        found = None if prefix is None else await items.find(connection, tenant, prefix)
        return await items.history(connection, tenant, found, limit)


def _since(text: str | None) -> datetime | None:
    if text is None:
        return None
    moment: date | datetime = day_or_instant(text, "--since")
    if isinstance(moment, datetime):
        return moment
    return datetime(moment.year, moment.month, moment.day, tzinfo=timezone.utc)


def _row(entry: Entry) -> tuple[object, ...]:
    name = entry.id[: items.ID_SHOWN]
    return name, entry.time, entry.account, entry.meter, entry.reason, entry.detail, entry.recorded_at


def _state(done: list[Action]) -> str:
    state = items.state(done)
    return state if state == "open" else done[0].sentence()


def _ways(found: Item, kind: Kind, done: list[Action]) -> list[str]:
    if items.state(done) != "open":
        undo = "`tallymark quarantine reopen` opens it again" if done[0].action == "discarded" else "it stays so"
        return [f"It is closed; {undo}."]
    explained = rule(found.reason, metered=found.metered)
    refusal = explained.refusal(kind)
    way = f"none: {refusal}" if refusal else explained.release
    discard = f"tallymark quarantine discard {found.id[: items.ID_SHOWN]} --because TEXT"
    return [f"Release: {way}.", f"Discard: `{discard}` bills nothing and keeps it."]


def _period_text(period: Affected) -> str:
    times = f"{output.iso(period.start)} to {output.iso(period.end)}"
    after = (
        "It has ended: its invoice is another one then, when it is made again." if period.ended else "It is still open."
    )
    return f"Released, it is in the period {times} of account {period.account!r} (plan {period.plan}). {after}"


def _write_history(done: list[Action]) -> None:
    output.write_table(
        ("id", "at", "action", "by", "database user", "billed to", "quantity", "new", "there before", "because"),
        [
            (
                action.id[: items.ID_SHOWN],
                action.acted_at,
                action.action,
                action.acted_by,
                action.database_user,
                action.billed_to,
                action.quantity,
                action.inserted + action.evidence,
                action.duplicates,
                action.because,
            )
            for action in done
        ],
        ("quantity", "new", "there before"),
    )


def _document(
    found: Item,
    content: Content,
    stored: list[Stored],
    periods: list[Affected],
    done: list[Action],
    by_file: list[Explained] | None,
) -> dict[str, Any]:
    explained = rule(found.reason, metered=found.metered)
    refusal = explained.refusal(content.kind)
    return {
        "id": found.id,
        "tenant": found.tenant,
        "account": found.account,
        "meter": found.meter,
        "metered": found.metered,
        "state": items.state(done),
        "reason": found.reason,
        "detail": found.detail,
        "time": found.time,
        "recorded_at": found.recorded_at,
        "kind": content.kind.value,
        "content": content.facts,
        "meaning": explained.meaning,
        "remedy": explained.remedy,
        "release": None if refusal else explained.release,
        "refusal": refusal,
        "stored": [one._asdict() for one in stored],
        "periods": [period._asdict() for period in periods],
        **({} if by_file is None else {"by_file": [one._asdict() for one in by_file]}),
        "history": [action._asdict() for action in done],
    }
