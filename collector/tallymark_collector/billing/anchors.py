"""The local days on which a subscription's periods begin: its anchors.

| cycle | a period begins on | where the calendar has no such day |
|---|---|---|
| `monthly` | `anchor_day` of each month | the month's last day: 31 January, 28 February, 31 March |
| `yearly` | `anchor_day` of `anchor_month` | 29 February: 28 February in every year that is no leap year |
| `weekly` | `anchor_weekday` | it always has |

Anchors are numbered by the month, year or week (Monday to Sunday) of the calendar that they lie in, so that the
one after a shortened month is the anchor day itself again.
"""

from calendar import monthrange
from datetime import date
from typing import Final

from tallymark_collector.billing.fields import WEEKDAYS
from tallymark_collector.billing.local_days import FIRST_DAY, LAST_DAY
from tallymark_collector.billing.plans import Subscription

_WEEK: Final = 7
_MONTHS: Final = 12


def first_after(subscription: Subscription) -> int:
    """The number of the first anchor after the day `since`."""
    number = number_of(subscription, subscription.since)
    day = anchor(subscription, number)
    return number if day is not None and day > subscription.since else number + 1


def number_of(subscription: Subscription, day: date) -> int:
    """The number of the month, year or week that the day lies in."""
    match subscription.cycle:
        case "weekly":
            return (day.toordinal() - 1) // _WEEK  # 1 January of the year 1 was a Monday
        case "yearly":
            return day.year
        case "monthly":
            return day.year * _MONTHS + day.month - 1


def anchor(subscription: Subscription, number: int) -> date | None:
    """The anchor with that number; None outside the calendar that billing works in."""
    match subscription.cycle:
        case "weekly":
            ordinal = number * _WEEK + WEEKDAYS.index(subscription.anchor_weekday or WEEKDAYS[0]) + 1
            if not FIRST_DAY.toordinal() - _WEEK <= ordinal <= LAST_DAY.toordinal() + _WEEK:
                return None
            return date.fromordinal(ordinal)
        case "yearly":
            return _clamped(number, subscription.anchor_month or 1, subscription.anchor_day or 1)
        case "monthly":
            year, month = divmod(number, _MONTHS)
            return _clamped(year, month + 1, subscription.anchor_day or 1)


def _clamped(year: int, month: int, day: int) -> date | None:
    if not FIRST_DAY.year <= year <= LAST_DAY.year:
        return None
    return date(year, month, min(day, monthrange(year, month)[1]))
