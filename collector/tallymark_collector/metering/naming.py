"""Who is billed, and by which dimensions: what a source's attributes are turned into."""

from __future__ import annotations

from typing import NamedTuple

from tallymark import conventions
from tallymark_collector.metering.rules import AccountFrom, From
from tallymark_collector.metering.rules import Source as _Source
from tallymark_collector.model import Attributes, AttributeValue, Reason, Refusal
from tallymark_collector.processors import validation
from tallymark_collector.processors.secret_texts import REDACTED


class Named(NamedTuple):
    """Whose usage it is, and of which series."""

    account: str
    dimensions: Attributes


def named(source: _Source, attributes: Attributes, resource: Attributes, fallback: str | None) -> Named | Refusal:
    """What usage with these attributes is billed as. `fallback` is the account where they name none."""
    account = account_of(source.account, attributes, resource)
    if isinstance(account, Refusal):
        if attributes.get(conventions.OVERFLOW) is True:
            return validation.OVERFLOWED
        if account.reason is not Reason.ACCOUNT_MISSING or fallback is None:
            return account
        account = fallback
    found = {name: _value(one, attributes, resource) for name, one in source.dimensions.items()}
    dimensions = Attributes.of({name: value for name, value in found.items() if value is not None})
    return validation.check_texts(dimensions) or Named(account, dimensions)


def account_of(places: tuple[AccountFrom, ...], attributes: Attributes, resource: Attributes) -> str | Refusal:
    """The account that the first of the places with anything in it names."""
    for place in places:
        value = _value(place, attributes, resource)
        # Redacted, here when it went to quarantine or by whoever sent it, it names everybody.
        if value is None or value == "" or value == REDACTED:
            continue
        name = validation.account_name(value)
        if name is None:
            most = validation.MAX_ACCOUNT_LENGTH
            detail = f"{place} must be a string or an integer of at most {most} characters to name an account"
            return Refusal(Reason.ATTRIBUTES_INVALID, detail)
        if place.strip_prefix is not None:
            name = name.removeprefix(place.strip_prefix)
        if place.map is not None and name not in place.map:
            return Refusal(Reason.ACCOUNT_MISSING, f"{place} is {name[:64]!r}, which is not in the file's `map`")
        if not name:
            continue
        return name if place.map is None else place.map[name]
    looked = ", ".join(map(str, places))
    return Refusal(Reason.ACCOUNT_MISSING, f"nothing names the account: looked at {looked}")


def _value(place: From, attributes: Attributes, resource: Attributes) -> AttributeValue:
    if place.attribute is not None:
        return attributes.get(place.attribute)
    assert place.resource is not None, "a place is one or the other"
    return resource.get(place.resource)
