"""Where a calendar day begins, as an instant.

Zones are those of the IANA time zone database, as `zoneinfo` finds it (the system's copy, else the `tzdata`
package).
"""

import difflib
from datetime import date, datetime, time, timedelta, timezone
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

FIRST_DAY = date(1970, 1, 1)
LAST_DAY = date(9990, 1, 1)
"""The calendar that billing works in: room on both sides for any offset and for a month more."""

_SECOND = timedelta(seconds=1)


@cache
def zone_names() -> frozenset[str]:
    """Names of the IANA database. Those that mean another place on another machine are left out."""
    return frozenset(available_timezones() - {"localtime", "Factory"})


def known_zone(name: str) -> str:
    """The name itself. Raises `ValueError` with the nearest known name where it is not one."""
    if name in zone_names():
        return name
    near = difflib.get_close_matches(name, sorted(zone_names()), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "use a name such as Europe/Zurich or UTC"
    raise ValueError(f"{name!r} is not an IANA time zone; {hint}")


def aware(instant: datetime) -> datetime:
    """The instant in UTC. Raises `ValueError` on a naive datetime."""
    if instant.utcoffset() is None:
        raise ValueError(f"{instant.isoformat()} has no time zone; give an aware datetime")
    return instant.astimezone(timezone.utc)


def start_of_day(day: date, zone: ZoneInfo) -> datetime:
    """The instant, in UTC, at which the local day begins.

    That is local midnight: the first one where clocks set back make it happen twice, and the first instant
    after the gap where clocks set forward leave it out (so a day that a zone skipped begins with the next one).
    """
    midnight = datetime.combine(day, time())
    # fold=0 names the earlier of two midnights. In a gap it applies the offset from before the change (PEP 495),
    # which lands on or after the change, so the way back does not return to midnight.
    instant = midnight.replace(tzinfo=zone).astimezone(timezone.utc)
    if instant.astimezone(zone).replace(tzinfo=None) == midnight:
        return instant
    return _end_of_gap(midnight, zone, instant)


def exists(day: date, zone: ZoneInfo) -> bool:
    """Whether the zone had that day: Pacific/Apia went from 29 to 31 December 2011."""
    return start_of_day(day, zone) < start_of_day(day + timedelta(days=1), zone)


def _end_of_gap(missing: datetime, zone: ZoneInfo, after: datetime) -> datetime:
    """The first instant at which local time has passed `missing`; the database's changes are at whole seconds."""
    before = missing.replace(tzinfo=zone, fold=1).astimezone(timezone.utc)
    before -= _SECOND
    while after - before > _SECOND:
        middle = before + timedelta(seconds=(after - before) // _SECOND // 2)
        if middle.astimezone(zone).replace(tzinfo=None) >= missing:
            after = middle
        else:
            before = middle
    return after
