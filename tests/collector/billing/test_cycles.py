"""Yearly and weekly periods, and all three cycles against a calendar that is walked day by day."""

from __future__ import annotations

import itertools
from datetime import date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tallymark_collector.billing.errors import PeriodError
from tallymark_collector.billing.local_days import exists, start_of_day, zone_names
from tallymark_collector.billing.periods import billing_period, period_containing, periods_between
from tallymark_collector.billing.plans import Subscription
from tests.support import calendar

ZONES = sorted(zone_names())
LEAP_DAY = {"cycle": "yearly", "anchor_month": 2, "anchor_day": 29}


def subscribed(since: str, zone: str = "UTC", until: str | None = None, **terms: object) -> Subscription:
    return Subscription.model_validate(
        {"account": "acme", "plan": "pro", "since": since, "time_zone": zone, "until": until, **terms}
    )


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def starts(subscription: Subscription, count: int) -> list[str]:
    zone = ZoneInfo(subscription.time_zone)
    return [billing_period(subscription, index).start.astimezone(zone).date().isoformat() for index in range(count)]


def test_a_year_from_29_february_begins_on_the_28th_in_other_years() -> None:
    subscription = subscribed("2024-02-29", **LEAP_DAY)
    assert starts(subscription, 6) == [
        "2024-02-29",
        "2025-02-28",
        "2026-02-28",
        "2027-02-28",
        "2028-02-29",
        "2029-02-28",
    ]
    assert period_containing(subscription, utc("2028-02-28T23:59:59")) == billing_period(subscription, 3)
    century = subscribed("2096-02-29", **LEAP_DAY)
    assert starts(century, 9)[4:] == ["2100-02-28", "2101-02-28", "2102-02-28", "2103-02-28", "2104-02-29"]


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("2026-06-29", ["2026-06-29", "2026-06-30", "2027-06-30"]),
        ("2026-06-30", ["2026-06-30", "2027-06-30", "2028-06-30"]),
        ("2026-07-01", ["2026-07-01", "2027-06-30", "2028-06-30"]),
        ("2026-01-01", ["2026-01-01", "2026-06-30", "2027-06-30"]),
    ],
)
def test_the_first_year_may_be_short(since: str, expected: list[str]) -> None:
    assert starts(subscribed(since, cycle="yearly", anchor_month=6, anchor_day=30), 3) == expected


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("2026-09-14", ["2026-09-14", "2026-09-16", "2026-09-23"]),
        ("2026-09-16", ["2026-09-16", "2026-09-23", "2026-09-30"]),
        ("2026-09-20", ["2026-09-20", "2026-09-23", "2026-09-30"]),
        ("2026-12-30", ["2026-12-30", "2027-01-06", "2027-01-13"]),
    ],
)
def test_weeks_begin_on_their_weekday(since: str, expected: list[str]) -> None:
    assert starts(subscribed(since, cycle="weekly", anchor_weekday="wednesday"), 3) == expected


def test_a_week_with_a_change_of_the_clocks_is_an_hour_longer_or_shorter() -> None:
    subscription = subscribed("2026-01-05", "Europe/Zurich", cycle="weekly", anchor_weekday="monday")
    found = periods_between(subscription, utc("2026-02-01"), utc("2026-12-01"))
    assert {p.end - p.start for p in found} == {timedelta(days=7, hours=hours) for hours in (-1, 0, 1)}
    half = subscribed("2026-01-05", "Australia/Lord_Howe", cycle="weekly", anchor_weekday="monday")
    lengths = {p.end - p.start for p in periods_between(half, utc("2026-01-05"), utc("2026-12-01"))}
    assert lengths == {timedelta(days=7, minutes=minutes) for minutes in (-30, 0, 30)}


@pytest.mark.parametrize(
    ("zone", "day", "expected"),
    [
        # Clocks went from 00:00 to 01:00: the week that begins there begins at 01:00 local time.
        ("America/Sao_Paulo", "2018-11-04", "2018-11-04T03:00"),
        ("Asia/Beirut", "2025-03-30", "2025-03-29T22:00"),
        ("America/Havana", "2025-03-09", "2025-03-09T05:00"),
        # The 30th was left out.
        ("Pacific/Apia", "2011-12-30", "2011-12-30T10:00"),
    ],
)
def test_an_anchor_whose_midnight_is_missing(zone: str, day: str, expected: str) -> None:
    weekday = date.fromisoformat(day).strftime("%A").lower()
    since = (date.fromisoformat(day) - timedelta(days=3)).isoformat()
    week = billing_period(subscribed(since, zone, cycle="weekly", anchor_weekday=weekday), 1)
    month, number = int(day[5:7]), int(day[8:])
    year = billing_period(subscribed(since, zone, cycle="yearly", anchor_month=month, anchor_day=number), 1)
    assert week.start == year.start == utc(expected)


@pytest.mark.parametrize("terms", [LEAP_DAY, {"cycle": "weekly", "anchor_weekday": "sunday"}])
def test_the_calendar_ends(terms: dict[str, object]) -> None:
    subscription = subscribed("2026-01-01", **terms)
    last = period_containing(subscription, utc("9989-12-31"))
    assert last is not None
    assert last.end == utc("9990-01-01")
    assert period_containing(subscription, utc("9990-01-01")) is None
    for index in (last.index + 1, 10**9, 10**15):
        with pytest.raises(PeriodError):
            billing_period(subscription, index)
    with pytest.raises(PeriodError):
        billing_period(subscription, -1)


anchors = st.one_of(
    st.fixed_dictionaries({"cycle": st.just("monthly"), "anchor_day": st.integers(1, 31)}),
    st.dates(date(2000, 1, 1), date(2000, 12, 31)).map(
        lambda day: {"cycle": "yearly", "anchor_month": day.month, "anchor_day": day.day}
    ),
    st.just(LEAP_DAY),
    st.fixed_dictionaries({"cycle": st.just("weekly"), "anchor_weekday": st.sampled_from(calendar.WEEKDAYS)}),
)
zones = st.sampled_from(sorted(calendar.AWKWARD_ZONES)) | st.sampled_from(ZONES)


@st.composite
def subscriptions(draw: st.DrawFn) -> dict[str, object]:
    zone = draw(zones)
    since = draw(st.dates(date(1970, 1, 1), date(2060, 1, 1)))
    until = draw(st.none() | st.integers(1, 900).map(lambda days: since + timedelta(days=days)))
    if not all(exists(day, ZoneInfo(zone)) for day in (since, until) if day):
        zone = "UTC"
    return {
        **draw(anchors),
        "time_zone": zone,
        "since": since.isoformat(),
        "until": until and until.isoformat(),
    }


def model(terms: dict[str, object]) -> Subscription:
    return Subscription.model_validate({"account": "acme", "plan": "pro", **terms})


@settings(deadline=None)
@example({**LEAP_DAY, "time_zone": "Asia/Kolkata", "since": "2023-03-01", "until": None})
@example(
    {"cycle": "monthly", "anchor_day": 30, "time_zone": "Pacific/Apia", "since": "2011-12-29", "until": "2011-12-31"}
)
@example(
    {"cycle": "weekly", "anchor_weekday": "friday", "time_zone": "Pacific/Apia", "since": "2011-12-01", "until": None}
)
@given(subscriptions())
def test_periods_are_those_of_the_calendar_day_by_day(terms: dict[str, object]) -> None:
    subscription = model(terms)
    zone = ZoneInfo(subscription.time_zone)
    stop = subscription.since + timedelta(days=1000)
    expected = calendar.periods(terms, stop)
    first = start_of_day(subscription.since, zone)
    found = periods_between(subscription, first, expected[-1][1])
    assert [(p.start, p.end) for p in found] == expected
    assert [p.index for p in found] == list(range(len(found)))
    for period, following in itertools.pairwise(found):
        assert period.end == following.start


@settings(deadline=None)
@given(subscriptions(), st.integers(0, 1000))
def test_a_local_day_lies_in_one_period_whole(terms: dict[str, object], days: int) -> None:
    subscription = model(terms)
    zone = ZoneInfo(subscription.time_zone)
    day = subscription.since + timedelta(days=days)
    start, end = (start_of_day(each, zone) for each in (day, day + timedelta(days=1)))
    holding = period_containing(subscription, start) if start < end else None
    covered = subscription.until is None or day < subscription.until
    if start == end:
        return  # a day that the zone skipped
    assert (holding is not None) == covered
    assert holding is None or holding.start <= start < end <= holding.end


@settings(deadline=None)
@given(subscriptions(), st.timedeltas(timedelta(days=-500), timedelta(days=1500)))
def test_every_instant_is_in_exactly_one_period(terms: dict[str, object], offset: timedelta) -> None:
    subscription = model(terms)
    zone = ZoneInfo(subscription.time_zone)
    first = start_of_day(subscription.since, zone)
    instant = first + offset
    found = period_containing(subscription, instant)
    around = periods_between(subscription, instant - timedelta(days=400), instant + timedelta(days=400))
    assert [p for p in around if instant in p] == ([found] if found else [])
    end = start_of_day(subscription.until, zone) if subscription.until else None
    assert (found is not None) == (first <= instant and (end is None or instant < end))


@settings(deadline=None, max_examples=300)
@given(zones, st.dates(date(1970, 1, 2), date(2060, 1, 1)))
def test_a_day_begins_where_the_clocks_first_show_it(zone: str, day: date) -> None:
    assert start_of_day(day, ZoneInfo(zone)) == calendar.first_instant(day, ZoneInfo(zone))
