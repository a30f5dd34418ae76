"""Options that several commands have, and how a person writes times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Final

import typer

from tallymark_collector.billing.local_days import FIRST_DAY, LAST_DAY
from tallymark_collector.errors import UserError
from tallymark_collector.metering import Rules, read_rules
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.query.usage import hour_from, hour_until

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="TALLYMARK_DATABASE",
        metavar="DATABASE",
        show_default="this user's embedded one",
        help="'embedded:/some/folder' or a PostgreSQL connection string.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
TenantOption = Annotated[
    str, typer.Option("--tenant", envvar="TALLYMARK_TENANT", metavar="TENANT", help="Whose usage: this tenant's.")
]
AnyTenantOption = Annotated[
    str | None,
    typer.Option("--tenant", envvar="TALLYMARK_TENANT", metavar="TENANT", show_default="all", help="Only this tenant."),
]
AccountOption = Annotated[str | None, typer.Option("--account", metavar="ACCOUNT", help="Only this account.")]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="TIME", help="First instant: a day (UTC), or a time such as 2026-09-01T08:30Z or …+02:00."
    ),
]
ToOption = Annotated[str | None, typer.Option("--to", metavar="TIME", help="First instant that is not included.")]

MetersOption = Annotated[
    Path | None,
    typer.Option(
        "--meters",
        envvar="TALLYMARK_METERS",
        metavar="FILE",
        help="The file that says which metrics and spans of other software are usage.",
    ),
]

RedactOption = Annotated[
    list[str] | None,
    typer.Option(
        "--redact",
        envvar="TALLYMARK_REDACT",
        metavar="NAME",
        show_default="credentials",
        help="Store REDACTED for this attribute, too; again for more, enduser.* for all that begin so.",
    ),
]
NoRedactionOption = Annotated[
    bool,
    typer.Option(
        "--no-redaction",
        envvar="TALLYMARK_NO_REDACTION",
        help="Store attributes as they come, credentials among them.",
    ),
]

_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIME: Final = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)[Tt ](?P<clock>\d\d:\d\d(?::\d\d)?)(?:\.(?P<fraction>\d{1,6}))?"
    r"(?P<zone>[Zz]|[+-]\d\d:?\d\d)?",
    re.ASCII,
)


def read_meters(path: Path) -> Rules:
    """A file of meters. Raises MetersError with everything that is wrong in it, UserError if it cannot be read."""
    try:
        return read_rules(path)
    except OSError as error:
        raise UserError(f"the file of meters {path} cannot be read: {error.strerror or error}") from None


def redaction_of(names: Sequence[str] | None, *, off: bool) -> Redaction:
    """What is to be stored of credentials. Raises UserError."""
    given = tuple(dict.fromkeys(names or ()))
    if off and given:
        raise UserError("--redact and --no-redaction contradict each other: leave one out")
    for name in given:
        if not name.rstrip("*") or "*" in name[:-1]:
            raise UserError(f"--redact {name!r} is no attribute's name, nor the beginning of one followed by *")
    return Redaction(given, on=not off)


def day_or_instant(text: str, option: str) -> date | datetime:
    """A day, or an instant in UTC. Raises UserError, naming the option."""
    try:
        found = _TIME.fullmatch(text)
        if found is None:
            return _in_calendar(date.fromisoformat(text if _DAY.fullmatch(text) else ""))
        if found["zone"] is not None:
            return _instant(found)
    except ValueError:
        raise UserError(
            f"{option} {text!r} is no time from {FIRST_DAY} on: write a day such as 2026-09-01, or a time with its"
            " zone such as 2026-09-01T08:30:00Z or 2026-09-01T10:30:00+02:00"
        ) from None
    raise UserError(f"{option} {text!r} has no time zone: write {text}Z for UTC, or an offset, such as {text}+02:00")


def time_range(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """`--from` and `--to` as instants; a day is its UTC midnight. Raises UserError."""
    start = None if since is None else midnight(day_or_instant(since, "--from"))
    end = None if until is None else midnight(day_or_instant(until, "--to"))
    if start is not None and end is not None and end < start:
        raise UserError(f"--to {until} lies before --from {since}: the range would be empty, swap them")
    return start, end


def hours_touched(start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """The whole UTC hours that have any of `[start, end)` in them."""
    return hour_until(start), hour_from(end)


def midnight(moment: date | datetime) -> datetime:
    """A day's UTC midnight; an instant as it is."""
    if isinstance(moment, datetime):
        return moment
    return datetime(moment.year, moment.month, moment.day, tzinfo=timezone.utc)


def _instant(found: re.Match[str]) -> datetime:
    """Python 3.10 reads neither Z nor +0200, and only three or six digits of a fraction."""
    zone = "+00:00" if found["zone"] in "Zz" else f"{found['zone'][:3]}:{found['zone'][-2:]}"
    fraction = (found["fraction"] or "").ljust(6, "0")
    clock = found["clock"] if found["clock"].count(":") == 2 else f"{found['clock']}:00"
    instant = datetime.fromisoformat(f"{found['day']}T{clock}.{fraction}{zone}")
    _in_calendar(instant.date())
    return instant.astimezone(timezone.utc)


def _in_calendar(day: date) -> date:
    if not FIRST_DAY <= day < LAST_DAY:
        raise ValueError(day)
    return day
