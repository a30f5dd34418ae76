"""Which instants are billed together, worked out the long way: day by day and minute by minute, with no arithmetic of
months, years or weeks, to hold the collector's periods against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime, timedelta, timezone
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

DAY = timedelta(days=1)
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

AWKWARD_ZONES = {
    "Asia/Kolkata": "+05:30",
    "Asia/Kathmandu": "+05:45",
    "Australia/Lord_Howe": "+10:30, and +11:00 in summer: its clocks change by half an hour",
    "Pacific/Chatham": "+12:45 and +13:45",
    "America/St_Johns": "-03:30; clocks changed at a minute after midnight until 2011",
    "America/Sao_Paulo": "no midnight on the day on which summer time began, until 2018",
    "Asia/Beirut": "no midnight on the day on which summer time begins",
    "America/Havana": "no midnight in March, two in November",
    "Pacific/Apia": "no 30 December 2011",
    "Africa/Monrovia": "-00:44:30 until 1972",
    "Africa/Casablanca": "clocks go back for Ramadan",
    "Europe/Zurich": "",
    "America/New_York": "",
    "UTC": "",
}


@cache
def first_instant(day: date, zone: ZoneInfo) -> datetime:
    """The first instant at which the zone's clocks show that day or a later one. Offsets since 1970 are multiples of
    half a minute."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=timezone.utc)
    instant = midnight - timedelta(hours=27)
    step = timedelta(seconds=30)
    while instant.astimezone(zone).date() < day:
        # An hour at a time as long as that cannot pass over a midnight.
        far = instant.astimezone(zone).replace(tzinfo=None) < midnight.replace(tzinfo=None) - timedelta(hours=3)
        instant += timedelta(hours=1) if far else step
    return instant


def is_anchor(day: date, terms: Mapping[str, object]) -> bool:
    """Whether a period begins with that day, whatever `since` says."""
    if terms["cycle"] == "weekly":
        return day.strftime("%A").lower() == terms["anchor_weekday"]
    if terms["cycle"] == "yearly" and day.month != terms["anchor_month"]:
        return False
    is_last = (day + DAY).month != day.month
    wanted = int(str(terms["anchor_day"]))
    return day.day == wanted or (is_last and day.day < wanted)


def boundaries(terms: Mapping[str, object], stop: date) -> Iterator[datetime]:
    """Where periods begin, from `since` to the first boundary on `stop` or after it."""
    zone = ZoneInfo(str(terms["time_zone"]))
    since = date.fromisoformat(str(terms["since"]))
    until = date.fromisoformat(str(terms["until"])) if terms.get("until") else None
    day = since
    while True:
        if day in (since, until) or is_anchor(day, terms):
            yield first_instant(day, zone)
            if day >= stop:
                return
        if day == until:
            return
        day += DAY


def periods(terms: Mapping[str, object], stop: date) -> list[tuple[datetime, datetime]]:
    """The periods that begin before `stop`. Where a zone skipped an anchor, two boundaries are one."""
    found = list(dict.fromkeys(boundaries(terms, stop)))
    return list(pairwise(found))
