"""Texts to instants: every format, offsets, zones whose clocks change, and what is no time."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone

import pytest

from tallymark_collector.imports.faults import LineFault
from tallymark_collector.imports.times import reader


def ns(*parts: int, offset: float = 0, nanoseconds: int = 0) -> int:
    moment = datetime(*parts, tzinfo=timezone(timedelta(hours=offset)))  # type: ignore[arg-type,misc]
    return int(moment.timestamp()) * 10**9 + nanoseconds


@pytest.mark.parametrize(
    ("format_", "zone", "text", "expected"),
    [
        ("clf", None, "17/May/2015:10:05:03 +0000", ns(2015, 5, 17, 10, 5, 3)),
        ("clf", None, "17/May/2015:10:05:03 +0200", ns(2015, 5, 17, 8, 5, 3)),
        ("clf", None, "31/Dec/2015:23:59:59 -0330", ns(2016, 1, 1, 3, 29, 59)),
        ("clf", None, "17/May/2015:10:05:03.25 +0000", ns(2015, 5, 17, 10, 5, 3, nanoseconds=250_000_000)),
        ("iso8601", None, "2026-09-01T08:30:00Z", ns(2026, 9, 1, 8, 30)),
        ("iso8601", None, "2026-09-01 08:30:00,123456789+02:00", ns(2026, 9, 1, 6, 30, nanoseconds=123_456_789)),
        ("iso8601", None, "2026-09-01t08:30-0130", ns(2026, 9, 1, 10, 0)),
        ("iso8601", "UTC", "2023-11-16 18:17:03.9799600", ns(2023, 11, 16, 18, 17, 3, nanoseconds=979_960_000)),
        ("iso8601", "Europe/Zurich", "2026-07-01T12:00:00", ns(2026, 7, 1, 10)),
        ("iso8601", "Europe/Zurich", "2026-01-01T12:00:00", ns(2026, 1, 1, 11)),
        ("iso8601", "Europe/Zurich", "2026-01-01T12:00:00Z", ns(2026, 1, 1, 12)),
        ("unix_s", None, "1431857103", ns(2015, 5, 17, 10, 5, 3)),
        ("unix_s", None, "1431857103.000000001", ns(2015, 5, 17, 10, 5, 3, nanoseconds=1)),
        ("unix_ms", None, "1431857103001", ns(2015, 5, 17, 10, 5, 3, nanoseconds=1_000_000)),
        ("unix_us", None, "1431857103000001", ns(2015, 5, 17, 10, 5, 3, nanoseconds=1000)),
        ("unix_ns", None, "1431857103000000001", ns(2015, 5, 17, 10, 5, 3, nanoseconds=1)),
        ("%d.%m.%Y %H:%M:%S", "Europe/Zurich", "01.07.2026 12:00:00", ns(2026, 7, 1, 10)),
        ("%Y%m%dT%H%M%S%z", None, "20260701T120000+0200", ns(2026, 7, 1, 10)),
        ("%Y-%m-%d %H:%M:%S %Z", "Europe/Zurich", "2026-11-20 10:00:00 UTC", ns(2026, 11, 20, 10)),
        ("%Y-%m-%d %H:%M:%S %Z", None, "2026-07-20 10:00:00 GMT", ns(2026, 7, 20, 10)),
        ("%Y-%m-%d %H:%M:%S%Z", "Europe/Zurich", "2026-07-20 10:00:00Z", ns(2026, 7, 20, 10)),
        ("%Z %Y-%m-%d %H:%M", "Europe/Zurich", "utc 2026-07-20 10:00", ns(2026, 7, 20, 10)),
        ("%Y-%m-%d %H:%M %z (%Z)", "Europe/Zurich", "2026-07-20 10:00 +0000 (UTC)", ns(2026, 7, 20, 10)),
        ("%Y-%m-%d %H:%M %%Z", "Europe/Zurich", "2026-07-20 10:00 %Z", ns(2026, 7, 20, 8)),
    ],
)
def test_a_time(format_: str, zone: str | None, text: str, expected: int) -> None:
    assert reader(format_, zone)(text) == expected


@pytest.mark.parametrize(
    ("format_", "zone", "text", "said"),
    [
        ("clf", None, "17/Mai/2015:10:05:03 +0000", "is not like 17/May/2015"),
        ("clf", None, "32/May/2015:10:05:03 +0000", "does not exist: day is out of range"),
        ("clf", None, "17/May/2015:10:05:60 +0000", "does not exist: second"),
        ("clf", None, "17/May/2015:10:05:03 +9900", "has no such offset"),
        ("clf", None, "17/May/2015:10:05:03", "is not like"),
        ("clf", None, "\u0661\u0667/May/2015:10:05:03 +0000", "is not like"),
        ("iso8601", None, "2026-09-01T08:30:00", "names no time zone, and the mapping has no time.time_zone"),
        ("iso8601", "UTC", "2026-09-01", "is not like 2026-09-01T"),
        ("iso8601", "UTC", "2026-02-29T00:00:00", "does not exist"),
        ("iso8601", "UTC", "yesterday", "is not like"),
        (
            "iso8601",
            "Europe/Zurich",
            "2026-10-25T02:30:00",
            "was twice in Europe/Zurich, where clocks changed: write it with its offset",
        ),
        ("iso8601", "Europe/Zurich", "2026-03-29T02:30:00", "was never in Europe/Zurich"),
        ("%d.%m.%Y %H:%M", "Europe/Zurich", "25.10.2026 02:30", "was twice"),
        ("%d.%m.%Y", "UTC", "2026-01-01", "is not like %d.%m.%Y"),
        ("%d.%m.%Y %H:%M %Z", "Europe/Zurich", "20.11.2026 10:00 CET", "%Z stands for UTC, GMT or Z alone"),
        ("%d.%m.%Y %H:%M %Z", "Europe/Zurich", "20.11.2026 10:00", "%Z stands for UTC, GMT or Z alone"),
        ("%d.%m.%Y %H:%M %Z", "Europe/Zurich", "20.11.2026 10:00 ", "%Z stands for UTC, GMT or Z alone"),
        ("unix_s", None, "-1", "is not a number since 1970"),
        ("unix_s", None, "1e9", "is not a number since 1970"),
        ("unix_s", None, "", "is not a number since 1970"),
    ],
)
def test_what_is_no_time(format_: str, zone: str | None, text: str, said: str) -> None:
    with pytest.raises(LineFault, match=said):
        reader(format_, zone)(text)


def test_both_hours_of_a_night_with_two_are_told_apart_by_their_offset() -> None:
    read = reader("iso8601", "Europe/Zurich")
    assert read("2026-10-25T02:30:00+01:00") - read("2026-10-25T02:30:00+02:00") == 3600 * 10**9


def test_a_zone_of_this_machine_is_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strptime` takes the names of the zone that the machine is in, whatever the mapping's is."""
    monkeypatch.setenv("TZ", "Europe/Zurich")
    time.tzset()
    try:
        with pytest.raises(LineFault, match="%Z stands for UTC, GMT or Z alone"):
            reader("%d.%m.%Y %H:%M %Z", "America/New_York")("20.11.2026 10:00 CET")
    finally:
        monkeypatch.undo()
        time.tzset()
