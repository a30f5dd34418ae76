"""The catalogue file: plans, prices and subscriptions, as a person writes them in YAML.

Everything wrong with a file is reported at once, each with its line and its field:

    plans.yaml:14: plans.pro.charges[1].graduated[0].up_to: must be above 1000: …
"""

from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import ErrorDetails

from tallymark_collector.billing.errors import CatalogError, CurrencyError
from tallymark_collector.billing.fields import CurrencyCode, Declared, maybe_day
from tallymark_collector.billing.money import minor_digits
from tallymark_collector.billing.plans import (
    KINDS,
    Catalog,
    FlatFee,
    Meter,
    Plan,
    PlanTerms,
    Subscription,
    SubscriptionTerms,
    Tier,
)
from tallymark_collector.documents.fields import Text, Value, Where, listed, part
from tallymark_collector.documents.reading import Shape, named, parse, read_text
from tallymark_collector.documents.yaml_text import Document, Path

_Item = TypeVar("_Item")


def _one_after_the_other(subscriptions: Sequence[object]) -> Iterable[tuple[Where, str]]:
    if not subscriptions:
        yield (), "needs at least one subscription; remove the account, or say its plan"
    for place in range(1, len(subscriptions)):
        ended = part(subscriptions[place - 1], "until")
        end, since = maybe_day(ended), maybe_day(part(subscriptions[place], "since"))
        if ended is None:
            yield (place - 1, "until"), "is required: another subscription of the account follows"
        elif end is not None and since is not None and since < end:
            yield (place, "since"), f"must not be before {end}, where the account's previous subscription ends"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


def _none_as_empty(value: object) -> object:
    return {} if value is None else value


_Section = Annotated[dict[Text, _Item], BeforeValidator(_none_as_empty)]
_Subscriptions = Annotated[tuple[SubscriptionTerms, ...], listed(_one_after_the_other), BeforeValidator(_as_list)]


class _File(Value):
    currency: CurrencyCode
    meters: _Section[Meter] = Field(default_factory=dict)
    plans: _Section[PlanTerms]
    accounts: _Section[_Subscriptions] = Field(default_factory=dict)


def read_catalog(path: str | FilePath) -> Catalog:
    """The catalogue in a file (UTF-8). Raises `CatalogError` with every problem, `OSError` if it can't be read."""
    return parse_catalog(read_text(path, CatalogError), str(path))


def parse_catalog(text: str, file: str = "plans.yaml") -> Catalog:
    """The catalogue in a text; `file` is the name in messages. Raises `CatalogError` with every problem."""
    content, _ = parse(text, file, _SHAPE)
    return _catalog(content)


def _catalog(content: _File) -> Catalog:
    return Catalog(
        currency=content.currency,
        meters=content.meters,
        plans={name: _plan(name, terms, content) for name, terms in content.plans.items()},
        subscriptions=tuple(
            Subscription(account=account, **dict(terms))
            for account, several in content.accounts.items()
            for terms in several
        ),
    )


def _plan(name: str, terms: PlanTerms, content: _File) -> Plan:
    meters = [charge.meter for charge in terms.charges if not isinstance(charge, FlatFee)]
    units = {meter: content.meters[meter].unit for meter in meters}
    found = {meter: content.meters[meter].aggregated() for meter in meters}
    aggregations = {meter: aggregation for meter, aggregation in found.items() if aggregation is not None}
    return Plan(id=name, currency=content.currency, units=units, aggregations=aggregations, **dict(terms))


def _declared(data: object) -> Declared:
    """What references can be held against. A section that is not a mapping is its own problem, and only that."""
    if not isinstance(data, dict):
        return Declared()
    try:
        digits = minor_digits(str(data.get("currency")))
    except CurrencyError:
        digits = None
    return Declared(meters=_names(data.get("meters")), plans=_names(data.get("plans")), digits=digits)


def _names(section: object) -> frozenset[str] | None:
    return frozenset(section or ()) if section is None or isinstance(section, dict) else None


def _in_file(loc: Path, document: Document) -> Path:
    """Pydantic's location without what it adds: a charge's kind, the index of a subscription that stands alone."""
    if loc[:1] == ("plans",) and len(loc) > 4 and loc[4] in KINDS:
        loc = (*loc[:4], *loc[5:])
    if loc[:1] == ("accounts",) and len(loc) > 2 and (*loc[:2], 0) not in document.values:
        loc = (*loc[:2], *loc[3:])
    return loc[:-1] if len(loc) == 3 and loc[2] == "[key]" else loc


def _message(error: ErrorDetails) -> str | None:
    if error["type"] == "tuple_type" and error["loc"][0] == "accounts":
        got = named(error.get("input"))
        return f"expected a mapping, e.g. {{plan: pro, since: 2026-01-01}}, or a list of such, got {got}"
    return None


def _fields(loc: Path) -> list[str]:
    """The fields of the value at pydantic's location."""
    model: type[Value]
    match loc:
        case ():
            model = _File
        case ("meters", _):
            model = Meter
        case ("plans", _):
            model = PlanTerms
        case ("plans", _, "charges", _, str(kind)):
            model = KINDS[kind]
        case ("plans", _, "charges", _, _, _, _):
            model = Tier
        case _:
            model = SubscriptionTerms
    return list(model.model_fields)


_SHAPE = Shape(
    _File,
    CatalogError,
    empty="is empty; a catalogue needs `currency` and `plans`",
    fields_at=_fields,
    in_file=_in_file,
    message=_message,
    context=_declared,
)
