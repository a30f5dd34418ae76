"""Texts to instants, in nanoseconds since the Unix epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import Final
from zoneinfo import ZoneInfo

from tallymark_collector.imports.faults import LineFault

FORMATS: Final = ("clf", "iso8601", "unix_s", "unix_ms", "unix_us", "unix_ns")
"""Or a pattern of `strptime`."""

_UNIT_NS: Final = {"unix_s": 10**9, "unix_ms": 10**6, "unix_us": 1000, "unix_ns": 1}
_NUMBER: Final = re.compile(r"\d{1,20}(\.\d{1,12})?", re.ASCII)
_MONTHS: Final = {
    name: number
    for number, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)  # noqa: SIM905
}
_CLF: Final = re.compile(
    r"(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))? ([+-])(\d\d)(\d\d)", re.ASCII
)
_ISO: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(?:([Zz])|([+-])(\d\d):?(\d\d))?",
    re.ASCII,
)
_DIRECTIVE: Final = re.compile("%.", re.DOTALL)
_UTC: Final = ("UTC", "GMT", "Z")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)

Reading = Callable[[str], int]


def reader(format_: str, zone: str | None) -> Reading:
    """How a time is read; `zone` is that of times that name none. What is returned raises LineFault."""
    of_zone = None if zone is None else ZoneInfo(zone)
    if format_ == "clf":
        return _clf
    if format_ == "iso8601":
        return lambda text: _iso(text, of_zone)
    if format_ in _UNIT_NS:
        return lambda text: _unix(text, _UNIT_NS[format_])
    if "%Z" in _DIRECTIVE.findall(format_):
        # `strptime` takes the names of the machine's own zone too, and then forgets which it was.
        named = {name: _DIRECTIVE.sub(partial(_instead, name), format_) for name in _UTC}
        return lambda text: _named(text, named, format_)
    return lambda text: _pattern(text, format_, of_zone)


@lru_cache(maxsize=4096)
def _clf(text: str) -> int:
    found = _CLF.fullmatch(text)
    if found is None or found[2] not in _MONTHS:
        raise LineFault(f"the time {text[:64]!r} is not like 17/May/2015:10:05:03 +0000")
    day, month, year, hour, minute, second, fraction, sign, hours, minutes = found.groups()
    moment = _moment(text, year, str(_MONTHS[month]), day, hour, minute, second)
    return _ns(moment.replace(tzinfo=_offset(text, sign, hours, minutes)), fraction)


def _iso(text: str, zone: ZoneInfo | None) -> int:
    found = _ISO.fullmatch(text)
    if found is None:
        raise LineFault(f"the time {text[:64]!r} is not like 2026-09-01T08:30:00.123Z")
    year, month, day, hour, minute, second, fraction, utc, sign, hours, minutes = found.groups()
    moment = _moment(text, year, month, day, hour, minute, second or "0")
    if utc:
        return _ns(moment.replace(tzinfo=timezone.utc), fraction)
    if sign:
        return _ns(moment.replace(tzinfo=_offset(text, sign, hours, minutes)), fraction)
    return _ns(_local(moment, zone, text), fraction)


def _unix(text: str, unit_ns: int) -> int:
    try:
        ns = Decimal(text if _NUMBER.fullmatch(text) else "") * unit_ns
    except InvalidOperation:
        raise LineFault(f"the time {text[:64]!r} is not a number since 1970") from None
    return int(ns)


def _pattern(text: str, pattern: str, zone: ZoneInfo | None) -> int:
    try:
        moment = datetime.strptime(text, pattern)  # noqa: DTZ007 - a pattern may have no zone, see _local
    except ValueError:
        raise LineFault(f"the time {text[:64]!r} is not like {pattern}") from None
    return _ns(moment if moment.tzinfo is not None else _local(moment, zone, text), None)


def _instead(name: str, directive: re.Match[str]) -> str:
    return name if directive[0] == "%Z" else directive[0]


def _named(text: str, patterns: Mapping[str, str], pattern: str) -> int:
    for name, written in patterns.items():
        if name in text.upper():
            with suppress(ValueError):
                moment = datetime.strptime(text, written)  # noqa: DTZ007 - its zone follows
                return _ns(moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc), None)
    raise LineFault(
        f"the time {text[:64]!r} is not like {pattern}, where %Z stands for UTC, GMT or Z alone: other names are"
        " those of several zones. Write an offset (%z), or no name and the mapping's time.time_zone"
    )


def _moment(text: str, *numbers: str) -> datetime:
    try:
        return datetime(*map(int, numbers))  # type: ignore[arg-type]  # noqa: DTZ001 - its zone follows
    except ValueError as error:
        raise LineFault(f"the time {text[:64]!r} does not exist: {error}") from None


def _offset(text: str, sign: str, hours: str, minutes: str) -> timezone:
    if int(hours) > 23 or int(minutes) > 59:
        raise LineFault(f"the time {text[:64]!r} has no such offset")
    offset = timedelta(hours=int(hours), minutes=int(minutes))
    return timezone(-offset if sign == "-" else offset)


def _local(moment: datetime, zone: ZoneInfo | None, text: str) -> datetime:
    """The instant at which the zone's clocks showed that. Raises LineFault where they did so twice, or never."""
    if zone is None:
        raise LineFault(f"the time {text[:64]!r} names no time zone, and the mapping has no time.time_zone")
    first, second = moment.replace(tzinfo=zone), moment.replace(tzinfo=zone, fold=1)
    if first.utcoffset() == second.utcoffset():
        return first
    back = first.astimezone(timezone.utc).astimezone(zone).replace(tzinfo=None)
    happened = "twice" if back == moment else "never"
    raise LineFault(
        f"the time {text[:64]!r} was {happened} in {zone.key}, where clocks changed: write it with its offset"
    )


def _ns(moment: datetime, fraction: str | None) -> int:
    try:
        whole = (moment - _EPOCH) // _MICROSECOND * 1000
    except OverflowError:
        raise LineFault("the time lies outside the calendar") from None
    return whole if not fraction else whole + int(fraction.ljust(9, "0"))
