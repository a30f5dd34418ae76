"""Who the example service's customers are. Everything follows from a customer's number, so that the service, the load
and the plans file agree without talking to each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

TIME_ZONES: Final = (
    "UTC",
    "America/New_York",
    "Asia/Kolkata",  # half an hour off the whole hours that usage is kept in
    "Europe/Zurich",
    "Australia/Lord_Howe",  # changes its clocks by half an hour
    "Asia/Kathmandu",  # three quarters
    "Pacific/Auckland",
)
ANCHOR_DAYS: Final = (1, 15, 28, 31)
SUBSCRIBED_FOR: Final = timedelta(days=100)
"""Long enough that today lies in a later period than the first one."""


@dataclass(frozen=True, slots=True)
class Customer:
    """One account of the service."""

    account: str
    api_key: str
    plan: str
    time_zone: str
    anchor_day: int


def customers(count: int) -> list[Customer]:
    """The first `count` customers: six in ten on the plan `starter`, three on `growth`, one on `scale`."""
    return [_customer(number) for number in range(count)]


def accounts_section(known: list[Customer], today: date) -> str:
    """The customers as the `accounts` of a plans file."""
    since = today - SUBSCRIBED_FOR
    return "accounts:\n" + "".join(
        f"  {customer.account}: {{plan: {customer.plan}, since: {since}, time_zone: {customer.time_zone},"
        f" anchor_day: {customer.anchor_day}}}\n"
        for customer in known
    )


def _customer(number: int) -> Customer:
    account = f"acct-{number:03}"
    return Customer(
        account=account,
        api_key=f"key-{account}",
        plan="starter" if number % 10 < 6 else "growth" if number % 10 < 9 else "scale",
        time_zone=TIME_ZONES[number % len(TIME_ZONES)],
        anchor_day=ANCHOR_DAYS[number % len(ANCHOR_DAYS)],
    )
