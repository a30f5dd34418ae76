"""The catalogue file: plans, prices and subscriptions, as a person writes them in YAML.

Everything wrong with a file is reported at once, each with its line and its field:

    plans.yaml:14: plans.pro.charges[1].graduated[0].up_to: must be above 1000: …
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from tallymark_collector.billing.errors import CatalogError, CurrencyError, Problem
from tallymark_collector.billing.fields import (
    CurrencyCode,
    Declared,
    Text,
    Value,
    Where,
    listed,
    maybe_day,
    near,
    part,
)
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
from tallymark_collector.billing.yaml_text import Document, Path, read_yaml

MAX_FILE_BYTES = 16 * 1024 * 1024

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
    file = FilePath(path)
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise CatalogError([Problem(str(file), 1, 1, "", f"is larger than {MAX_FILE_BYTES:,} bytes; split it")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CatalogError([Problem(str(file), line, 1, "", "is not UTF-8; save it as UTF-8")]) from None
    return parse_catalog(text, str(file))


def parse_catalog(text: str, file: str = "plans.yaml") -> Catalog:
    """The catalogue in a text; `file` is the name in messages. Raises `CatalogError` with every problem."""
    document = read_yaml(text)
    problems = [Problem(file, *place, _field(path), message) for place, path, message in document.faults]
    if document.data is None and not problems:
        problems.append(Problem(file, 1, 1, "", "is empty; a catalogue needs `currency` and `plans`"))
    if document.data is None:
        raise CatalogError(problems)
    content = None
    try:
        content = _File.model_validate(document.data, context=_declared(document.data))
    except ValidationError as error:
        problems += _problems(error.errors(include_url=False), document, file)
    if content is None or problems:
        raise CatalogError(sorted(set(problems), key=lambda problem: (problem.line, problem.column)))
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


def _problems(errors: Sequence[ErrorDetails], document: Document, file: str) -> list[Problem]:
    # A misspelt field is one mistake, though it is an unknown field and a missing one too.
    meant = {(*each["loc"][:-1], _intended(each["loc"])) for each in errors if each["type"] == "extra_forbidden"}
    return [
        Problem(file, *_place(each, document), _field(_in_file(each["loc"], document)), _message(each))
        for each in errors
        if not (each["type"] == "missing" and each["loc"] in meant)
    ]


def _place(error: ErrorDetails, document: Document) -> tuple[int, int]:
    of_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
    return document.place(_in_file(error["loc"], document), of_key=of_key)


def _in_file(loc: Path, document: Document) -> Path:
    """Pydantic's location without what it adds: a charge's kind, the index of a subscription that stands alone."""
    if loc[:1] == ("plans",) and len(loc) > 4 and loc[4] in KINDS:
        loc = (*loc[:4], *loc[5:])
    if loc[:1] == ("accounts",) and len(loc) > 2 and (*loc[:2], 0) not in document.values:
        loc = (*loc[:2], *loc[3:])
    return loc[:-1] if len(loc) == 3 and loc[2] == "[key]" else loc


def _field(path: Path) -> str:
    text = ""
    for part_ in path:
        if isinstance(part_, int):
            text += f"[{part_}]"
        elif re.fullmatch("[A-Za-z0-9_-]+", part_):
            text += f".{part_}" if text else part_
        else:
            # A meter's name has dots of its own.
            text += f"[{json.dumps(part_, ensure_ascii=False)}]"
    return text


def _message(error: ErrorDetails) -> str:
    got = error.get("input")
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            intended = _intended(error["loc"])
            known = ", ".join(_fields(error["loc"][:-1]))
            return f"unknown field; did you mean {intended}?" if intended else f"unknown field; known are {known}"
        case "tuple_type" if error["loc"][0] == "accounts":
            return f"expected a mapping, e.g. {{plan: pro, since: 2026-01-01}}, or a list of such, got {_named(got)}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a mapping (name: value), got {_named(got)}"
        case "tuple_type":
            return f"expected a list (- …), got {_named(got)}"
        case "string_type" if isinstance(got, dict):
            return 'expected text, got a mapping; text with braces needs quotes, e.g. "{request}"'
        case "string_type":
            return f"expected text, got {_named(got)}"
        case _:
            return error["msg"]


def _named(value: object) -> str:
    names: Mapping[type[Any], str] = {type(None): "nothing", dict: "a mapping", list: "a list"}
    return names.get(type(value), f"the text {value!r}")


def _intended(loc: Path) -> str:
    return near(str(loc[-1]), _fields(loc[:-1]), "")


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
