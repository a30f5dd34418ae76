"""Billing periods: which instants are billed together.

A period begins at local midnight of one of the subscription's anchors (each month, year or week has one, see
`anchors`) and ends where the next one begins: half-open, `[start, end)`. Where local midnight is missing or
happens twice, see `local_days.start_of_day`.

Period 0 begins with the day `since`, and is shorter than the others where that is not an anchor. The last one
ends with `until`. Nothing is prorated: flat fees, included quantities and tiers are whole in a shortened
period. Pick `since` on an anchor to have none.
"""

from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from tallymark_collector.billing import anchors
from tallymark_collector.billing.errors import PeriodError
from tallymark_collector.billing.local_days import LAST_DAY, aware, start_of_day
from tallymark_collector.billing.plans import Subscription


@dataclass(frozen=True)
class Period:
    """The half-open time `[start, end)`, both aware and in UTC; `index` counts from the subscription's first."""

    index: int
    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        """Raises `ValueError` on naive datetimes and on a period without time in it."""
        object.__setattr__(self, "start", aware(self.start))
        object.__setattr__(self, "end", aware(self.end))
        if self.start >= self.end:
            raise ValueError(f"a period ends after it starts, got {self.start} to {self.end}")

    def __contains__(self, instant: datetime) -> bool:
        """Whether an aware instant is in the period. Raises `ValueError` on a naive one."""
        return self.start <= aware(instant) < self.end


def billing_period(subscription: Subscription, index: int) -> Period:
    """The period with that index. Raises `PeriodError` where the subscription does not have one."""
    found = _period(subscription, index) if index >= 0 else None
    if found is None:
        raise PeriodError(f"{subscription.account} has no period {index} on {subscription.plan}")
    return found


def period_containing(subscription: Subscription, instant: datetime) -> Period | None:
    """The one period that an aware instant is in; None before `since` and from `until` on.

    Raises `ValueError` on a naive instant.
    """
    instant = aware(instant)
    if not _starts(subscription) <= instant < _ends(subscription):
        return None
    local = instant.astimezone(ZoneInfo(subscription.time_zone)).date()
    # The month, year or week tells the index within one; the instants themselves decide.
    guess = max(anchors.number_of(subscription, local) - anchors.first_after(subscription), -1) + 1
    for index in (guess, guess - 1, guess + 1):
        period = _period(subscription, index) if index >= 0 else None
        if period is not None and instant in period:
            return period
    raise AssertionError(f"periods of {subscription} leave a gap at {instant}")


def periods_between(subscription: Subscription, start: datetime, end: datetime) -> list[Period]:
    """Every period that shares time with `[start, end)`, in order; periods are given whole, not cut.

    Raises `ValueError` on naive instants and where `end` is before `start`.
    """
    start, end = aware(start), aware(end)
    if end < start:
        raise ValueError(f"the end {end} is before the start {start}")
    first = period_containing(subscription, max(start, _starts(subscription)))
    if first is None or start == end:
        return []
    found = []
    period: Period | None = first
    while period is not None and period.start < end:
        found.append(period)
        period = _period(subscription, period.index + 1)
    return found


def _period(subscription: Subscription, index: int) -> Period | None:
    """None past the last one. The end is compared as an instant: two days begin at once where one was skipped."""
    start, end = _boundary(subscription, index), _boundary(subscription, index + 1)
    if start is None or end is None:
        return None
    end = min(end, _ends(subscription))
    return Period(index, start, end) if start < end else None


def _boundary(subscription: Subscription, index: int) -> datetime | None:
    if index == 0:
        return _starts(subscription)
    day = anchors.anchor(subscription, anchors.first_after(subscription) + index - 1)
    return None if day is None else start_of_day(day, ZoneInfo(subscription.time_zone))


def _starts(subscription: Subscription) -> datetime:
    return start_of_day(subscription.since, ZoneInfo(subscription.time_zone))


def _ends(subscription: Subscription) -> datetime:
    """Where `until` is open, the end of the calendar that billing works in."""
    return start_of_day(subscription.until or LAST_DAY, ZoneInfo(subscription.time_zone))
