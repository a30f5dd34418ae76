import itertools
from datetime import date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.billing.errors import PeriodError
from tallymark_collector.billing.local_days import exists, start_of_day, zone_names
from tallymark_collector.billing.periods import Period, billing_period, period_containing, periods_between
from tallymark_collector.billing.plans import Subscription

ZONES = sorted(zone_names())


def subscribed(since: str, anchor_day: int = 1, zone: str = "UTC", until: str | None = None) -> Subscription:
    return Subscription.model_validate(
        {
            "account": "acme",
            "plan": "pro",
            "since": since,
            "anchor_day": anchor_day,
            "time_zone": zone,
            "until": until,
        }
    )


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def starts(subscription: Subscription, count: int) -> list[str]:
    return [billing_period(subscription, index).start.strftime("%m-%d") for index in range(count)]


@pytest.mark.parametrize(
    ("anchor_day", "expected"),
    [
        (29, ["01-29", "02-28", "03-29", "04-29", "05-29"]),
        (30, ["01-30", "02-28", "03-30", "04-30", "05-30"]),
        (31, ["01-31", "02-28", "03-31", "04-30", "05-31"]),
    ],
)
def test_late_anchor_days_clamp_and_do_not_drift(anchor_day: int, expected: list[str]):
    assert starts(subscribed(f"2026-01-{anchor_day}", anchor_day), 5) == expected


def test_a_leap_year_has_its_29th():
    assert starts(subscribed("2028-01-31", 31), 3) == ["01-31", "02-29", "03-31"]


def test_the_year_turns():
    period = billing_period(subscribed("2026-12-15", 15), 0)
    assert (period.start, period.end) == (utc("2026-12-15"), utc("2027-01-15"))


@pytest.mark.parametrize(
    ("since", "first_end"), [("2026-01-14", "2026-01-15"), ("2026-01-15", "2026-02-15"), ("2026-01-16", "2026-02-15")]
)
def test_the_first_period_may_be_short(since: str, first_end: str):
    subscription = subscribed(since, 15)
    first, second = billing_period(subscription, 0), billing_period(subscription, 1)
    assert (first.start, first.end) == (utc(since), utc(first_end))
    assert second.start == first.end


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("2026-03-01", ("2026-02-01", "2026-03-01")),
        ("2026-03-02", ("2026-03-01", "2026-03-02")),
        ("2026-01-11", ("2026-01-10", "2026-01-11")),
    ],
)
def test_the_last_period_ends_with_until(until: str, last: tuple[str, str]):
    subscription = subscribed("2026-01-10", until=until)
    found = periods_between(subscription, utc("2020-01-01"), utc("2030-01-01"))
    assert (found[-1].start, found[-1].end) == (utc(last[0]), utc(last[1]))
    with pytest.raises(PeriodError):
        billing_period(subscription, found[-1].index + 1)
    assert period_containing(subscription, utc(until)) is None
    assert period_containing(subscription, utc(until) - timedelta(microseconds=1)) == found[-1]
    assert period_containing(subscription, utc("2026-01-10") - timedelta(microseconds=1)) is None


def test_the_calendar_ends():
    subscription = subscribed("2026-01-01")
    assert period_containing(subscription, utc("9989-12-31")) is not None
    assert period_containing(subscription, utc("9990-01-01")) is None
    for index in (12 * (9990 - 2026), 10**9):
        with pytest.raises(PeriodError):
            billing_period(subscription, index)


def test_negative_indices_are_no_periods():
    with pytest.raises(PeriodError):
        billing_period(subscribed("2026-01-01"), -1)


def test_midnight_is_the_accounts_own():
    period = billing_period(subscribed("2026-03-15", 15, "Europe/Zurich"), 0)
    # Winter time is an hour ahead of UTC, summer time (from 29 March) two.
    assert (period.start, period.end) == (utc("2026-03-14T23:00"), utc("2026-04-14T22:00"))


@pytest.mark.parametrize(
    ("zone", "day", "expected"),
    [
        # Clocks go from 00:00 to 01:00: the day begins at 01:00 summer time.
        ("Asia/Beirut", "2025-03-30", "2025-03-29T22:00"),
        ("America/Havana", "2025-03-09", "2025-03-09T05:00"),
        # Clocks go from 01:00 back to 00:00: the first of the two midnights, still summer time.
        ("America/Havana", "2025-11-02", "2025-11-02T04:00"),
        # From 24:00 back to 23:00: there is one midnight, an hour later.
        ("Asia/Beirut", "2025-10-26", "2025-10-25T22:00"),
        # 23:59:59 of the 29th was followed by the 31st.
        ("Pacific/Apia", "2011-12-30", "2011-12-30T10:00"),
        ("Pacific/Apia", "2011-12-31", "2011-12-30T10:00"),
    ],
)
def test_midnights_that_are_missing_or_double(zone: str, day: str, expected: str):
    assert start_of_day(date.fromisoformat(day), ZoneInfo(zone)) == utc(expected)


def test_a_gap_that_begins_before_midnight_ends_the_day_before_at_its_start():
    # Toronto's clocks went from 23:30 on 30 March 1919 to 00:30.
    assert start_of_day(date(1919, 3, 31), ZoneInfo("America/Toronto")) == utc("1919-03-31T04:30")


def test_a_day_that_a_zone_skipped_is_no_first_day():
    assert not exists(date(2011, 12, 30), ZoneInfo("Pacific/Apia"))
    with pytest.raises(ValueError, match="Pacific/Apia had no 2011-12-30"):
        subscribed("2011-12-30", 1, "Pacific/Apia")
    with pytest.raises(ValueError, match="Pacific/Apia had no 2011-12-30"):
        subscribed("2011-12-01", 1, "Pacific/Apia", until="2011-12-30")


def test_the_hour_that_returns_to_the_day_before_stays_in_the_period_that_has_begun():
    # Newfoundland's clocks went from 00:01 on 1 November 2009 back to 23:01 on 31 October.
    subscription = subscribed("2009-01-01", 1, "America/St_Johns")
    november = period_containing(subscription, utc("2009-11-01T02:30"))
    assert november is not None
    assert november.start == utc("2009-11-01T02:30")
    again_october = utc("2009-11-01T02:45")
    assert again_october.astimezone(ZoneInfo("America/St_Johns")).date() == date(2009, 10, 31)
    assert period_containing(subscription, again_october) == november


def test_a_period_contains_its_start_and_not_its_end():
    period = billing_period(subscribed("2026-01-01"), 0)
    assert period.start in period
    assert period.end not in period
    assert period.end - timedelta(microseconds=1) in period


def test_no_period_is_empty_where_a_day_was_skipped():
    subscription = subscribed("2011-12-01", 30, "Pacific/Apia", until="2011-12-31")
    assert [p.index for p in periods_between(subscription, utc("2011-01-01"), utc("2013-01-01"))] == [0]


def test_periods_between_gives_whole_periods_that_share_time():
    subscription = subscribed("2026-01-01")

    def indices(start: str, end: str) -> list[int]:
        return [p.index for p in periods_between(subscription, utc(start), utc(end))]

    assert indices("2026-02-01", "2026-03-01") == [1]
    assert indices("2026-02-01", "2026-03-01T00:00:00.000001") == [1, 2]
    assert indices("2026-01-31T23:59:59.999999", "2026-03-01") == [0, 1]
    assert indices("2026-02-10", "2026-02-10") == []
    assert indices("2025-01-01", "2026-01-01") == []
    with pytest.raises(ValueError, match="before the start"):
        indices("2026-02-02", "2026-02-01")


def test_naive_datetimes_raise():
    subscription, naive = subscribed("2026-01-01"), datetime(2026, 2, 1)  # noqa: DTZ001
    with pytest.raises(ValueError, match="no time zone"):
        period_containing(subscription, naive)
    with pytest.raises(ValueError, match="no time zone"):
        periods_between(subscription, utc("2026-01-01"), naive)
    with pytest.raises(ValueError, match="no time zone"):
        Period(0, naive, utc("2027-01-01"))
    with pytest.raises(ValueError, match="no time zone"):
        _ = naive in billing_period(subscription, 0)


def test_periods_are_in_utc_whatever_came_in():
    zone = ZoneInfo("Asia/Kathmandu")
    period = Period(0, datetime(2026, 1, 1, tzinfo=zone), datetime(2026, 2, 1, tzinfo=zone))
    assert period.start.isoformat() == "2025-12-31T18:15:00+00:00"
    with pytest.raises(ValueError, match="ends after it starts"):
        Period(0, period.end, period.start)


@st.composite
def subscriptions(draw: st.DrawFn) -> Subscription:
    zone = draw(st.sampled_from(ZONES))
    since = draw(st.dates(date(1970, 1, 1), date(2060, 1, 1)))
    until = draw(st.none() | st.integers(1, 1_500).map(lambda days: since + timedelta(days=days)))
    days = [day for day in (since, until) if day]
    if not all(exists(day, ZoneInfo(zone)) for day in days):
        zone = "UTC"
    return subscribed(since.isoformat(), draw(st.integers(1, 31)), zone, until and until.isoformat())


@given(subscriptions())
def test_periods_tile_time(subscription: Subscription):
    zone = ZoneInfo(subscription.time_zone)
    first = start_of_day(subscription.since, zone)
    found = periods_between(subscription, first, first + timedelta(days=1_600))
    assert found[0].start == first
    assert [p.index for p in found] == list(range(len(found)))
    for period, following in itertools.pairwise(found):
        assert period.end == following.start
        # A month, give or take what clocks and clamping do; the first may be shorter.
        assert period.end - period.start <= timedelta(days=32)
        assert period.index == 0 or period.end - period.start >= timedelta(days=26)
    if subscription.until:
        assert found[-1].end == start_of_day(subscription.until, zone)
    else:
        assert found[-1].end >= first + timedelta(days=1_600)


@given(subscriptions(), st.timedeltas(timedelta(days=-40), timedelta(days=1_600)))
def test_every_instant_is_in_exactly_one_period(subscription: Subscription, offset: timedelta):
    zone = ZoneInfo(subscription.time_zone)
    instant = start_of_day(subscription.since, zone) + offset
    found = period_containing(subscription, instant)
    around = periods_between(subscription, instant - timedelta(days=40), instant + timedelta(days=40))
    assert [p for p in around if p.start <= instant < p.end] == ([found] if found else [])
    covered = offset >= timedelta(0)
    if subscription.until:
        covered = covered and instant < start_of_day(subscription.until, zone)
    assert (found is not None) == covered


@given(st.sampled_from(ZONES), st.dates(date(1970, 1, 1), date(2060, 1, 1)))
def test_a_day_begins_where_local_time_first_reaches_it(zone_name: str, day: date):
    zone = ZoneInfo(zone_name)
    start = start_of_day(day, zone)
    assert start.astimezone(zone).date() >= day
    for earlier in (timedelta(seconds=1), timedelta(minutes=7), timedelta(hours=2), timedelta(hours=20)):
        assert (start - earlier).astimezone(zone).date() < day


@pytest.mark.parametrize("zone", ["Asia/Beirut", "America/Havana", "Pacific/Apia", "Africa/Cairo", "America/Asuncion"])
def test_periods_tile_time_where_midnights_go_missing(zone: str):
    # Every day of the month is an anchor, over years with a change at midnight.
    for anchor_day in range(1, 32):
        subscription = subscribed("2008-01-01", anchor_day, zone)
        found = periods_between(subscription, utc("2008-02-01"), utc("2014-01-01"))
        assert all(a.end == b.start for a, b in itertools.pairwise(found))
        for period in found:
            for instant in (period.start, period.end - timedelta(microseconds=1)):
                assert period_containing(subscription, instant) == period
