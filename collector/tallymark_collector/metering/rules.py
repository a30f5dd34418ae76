"""Which telemetry is which usage: values that check themselves, as a person writes them in the file of meters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag, model_validator

from tallymark import conventions
from tallymark_collector.documents.fields import TenantName, Text, Unit, Value, near, one_of, wrong
from tallymark_collector.metering.amounts import Factor
from tallymark_collector.metering.conditions import Asked, Pattern, Patterns
from tallymark_collector.processors.validation import MAX_ATTRIBUTES

ONE: Final = Decimal(1)
RESERVED_SCOPES: Final = frozenset({conventions.SCOPE_NAME, conventions.CONTROL_SCOPE, conventions.MIRROR_SCOPE_NAME})
"""Of our own SDK: what it sends is billed by itself already, or never."""

KINDS: Final = ("internal", "server", "client", "producer", "consumer")
"""SpanKind's names, from 1."""
STATUSES: Final = ("unset", "ok", "error")
"""StatusCode's names, from 0."""

_ANNOTATION: Final = re.compile(r"1?\{[^{}]*\}|1|", re.ASCII)
_UCUM: Final = re.compile(r"(?:[!-z|~]|\{[!-z|~]*\})+", re.ASCII)
_INSTANT: Final = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d)(:\d\d)?([Zz]|[+-]\d\d:\d\d))?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


def dimensionless(unit: str) -> bool:
    """True for units that only name what is counted: "1", "{request}", or none."""
    return _ANNOTATION.fullmatch(unit) is not None


def _ucum(unit: str) -> str:
    if not unit:
        raise wrong('must not be empty; a plain number has the unit "1", what is counted one such as "{request}"')
    if not _UCUM.fullmatch(unit):
        raise wrong(f"{unit!r} is no unit of UCUM: ASCII without blanks, e.g. By, s, or {{call}} for what is counted")
    return unit


def _instant(value: object) -> int:
    found = _INSTANT.fullmatch(value) if isinstance(value, str) else None
    try:
        if found is None:
            raise ValueError  # noqa: TRY301 - one message for both
        clock = f"{found[2] or '00:00'}{found[3] or ':00'}"
        zone = "+00:00" if found[4] in (None, "Z", "z") else found[4]
        instant = datetime.fromisoformat(f"{found[1]}T{clock}{zone}")
    except ValueError:
        raise wrong(f"expected a time such as 2026-12-01T00:00:00Z, or a day (UTC), got {value!r}") from None
    return int((instant - _EPOCH).total_seconds()) * 1_000_000_000


def _as_attribute(value: object) -> object:
    return {"attribute": value} if isinstance(value, str) else value


def _some(value: object) -> object:
    if isinstance(value, (list, dict)) and not value:
        raise wrong("must not be empty")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _words(known: tuple[str, ...]) -> BeforeValidator:
    single = one_of(known)

    def check(value: object) -> object:
        return [single.func(each) for each in (value if isinstance(value, list) else [value])]  # type: ignore[call-arg]

    return BeforeValidator(check)


class From(Value):
    """One attribute: of the point or span, or of the resource."""

    attribute: Text | None = None
    resource: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> From:
        if (self.attribute is None) is (self.resource is None):
            raise wrong("name one attribute: `attribute` of the point or span, or `resource`")
        return self

    def __str__(self) -> str:
        """As a message calls it."""
        return self.attribute if self.attribute is not None else f"resource's {self.resource}"


class AccountFrom(From):
    """Where the account's name stands, and how it is written there."""

    strip_prefix: Text | None = None
    map: dict[Text, Text] | None = None
    """From the name there to the account. A name that is not in it is nobody's."""


def _dimensions(value: object) -> object:
    if not isinstance(value, list):
        return value
    found: dict[str, object] = {}
    for each in value:
        one = each if isinstance(each, dict) else {"attribute": each}
        name = next(iter(one.values()), None)
        if len(one) != 1 or not isinstance(name, str) or next(iter(one)) not in ("attribute", "resource"):
            raise wrong("expected names of attributes, or {resource: name}; to rename them write new_name: name")
        if name in found:
            raise wrong(f"{name} is given twice; keep one, or rename: new_name: {{resource: {name}}}")
        found[name] = one
    return found


def _check_dimensions(found: dict[str, From]) -> dict[str, From]:
    if len(found) > MAX_ATTRIBUTES:
        raise wrong(f"at most {MAX_ATTRIBUTES} dimensions, got {len(found)}")
    if conventions.ACCOUNT in found:
        raise wrong(f"{conventions.ACCOUNT} is the account, not a dimension; name another")
    return found


_Dimension = Annotated[From, BeforeValidator(_as_attribute)]
Dimensions = Annotated[dict[Text, _Dimension], AfterValidator(_check_dimensions), BeforeValidator(_dimensions)]
_Account = Annotated[AccountFrom, BeforeValidator(_as_attribute)]
Accounts = Annotated[tuple[_Account, ...], BeforeValidator(_some), BeforeValidator(_as_list)]
Instant = Annotated[int, PlainValidator(_instant)]


def _not_ours(globs: Any) -> Any:
    for glob in globs or ():
        if glob.exact and glob.text in RESERVED_SCOPES:
            raise wrong(f"{glob.text} is the scope of Tallymark's own SDK: what it sends is usage without this file")
    return globs


def _once(tenants: tuple[str, ...]) -> tuple[str, ...]:
    for name in tenants:
        if tenants.count(name) > 1:
            raise wrong(f"{name} is given twice; keep one")
    return tenants


Tenants = Annotated[tuple[TenantName, ...], AfterValidator(_once), BeforeValidator(_some), BeforeValidator(_as_list)]


class _Source(Value):
    tenants: Tenants = ()
    """Whose telemetry it takes; every tenant's where none is named."""
    scope: Annotated[Patterns | None, AfterValidator(_not_ours)] = None
    resource: dict[Text, Asked] = Field(default_factory=dict)
    where: dict[Text, Asked] = Field(default_factory=dict)
    account: Accounts
    dimensions: Dimensions = Field(default_factory=dict)
    factor: Factor | None = None
    source_unit: Unit | None = None
    since: Instant | None = None
    """Nanoseconds since the Unix epoch. What ended by then does not count."""

    @property
    def by(self) -> Decimal:
        """What a measured value is multiplied by."""
        return ONE if self.factor is None else self.factor

    def is_of(self, tenant: str) -> bool:
        """True if it takes this tenant's telemetry."""
        return not self.tenants or tenant in self.tenants


class MetricSource(_Source):
    """Metrics that are usage."""

    metric: Pattern
    quantity: Annotated[Literal["value", "count", "sum"], one_of(("value", "count", "sum"))]
    """A counter's value, or a gauge's in a meter of levels; a histogram's or summary's count or sum."""

    def check_level(self) -> str | None:
        """What is wrong with this source in a meter of levels, or None."""
        if self.quantity != "value":
            return f"a {self.quantity} is no level; say `quantity: value`, of a gauge or an UpDownCounter"
        return None

    def check_unit(self, unit: str) -> str | None:
        """What is wrong between the meter's unit and this source, or None."""
        if self.quantity == "count" and self.factor is None and not dimensionless(unit):
            return _NO_UNIT.format(what="a count", unit=unit)
        return None

    def check_source_unit(self, source: str, unit: str) -> str | None:
        """What is wrong between the unit that a metric came in and the meter's, or None."""
        if self.quantity == "count":
            return None
        if self.source_unit is not None:
            wrong_unit = source != self.source_unit
            return f"it comes in {source!r}, the file says `source_unit: {self.source_unit}`" if wrong_unit else None
        if self.factor is not None or source in ("", unit) or (dimensionless(source) and dimensionless(unit)):
            return None
        return f"it comes in {source!r}, the meter's unit is {unit!r}: say by which `factor`"


class Number(Value):
    """A span attribute that holds the quantity."""

    attribute: Text


def _word(value: object) -> object:
    if value in ("spans", "duration"):
        return value
    meant = near(str(value), ("spans", "duration"), "; did you mean ")
    raise wrong(f"expected spans (one for each), duration (in s) or {{attribute: name}}, got {value!r}{meant}")


def _kind_of_quantity(value: object) -> str:
    return "attribute" if isinstance(value, (dict, Number)) else "word"


_SpanQuantity = Annotated[
    Annotated[Literal["spans", "duration"], BeforeValidator(_word), Tag("word")] | Annotated[Number, Tag("attribute")],
    Discriminator(_kind_of_quantity),
]


_NO_UNIT: Final = "{what} has no unit, the meter's is {unit!r}: use one such as {{request}}, or say by which `factor`"


class SpanSource(_Source):
    """Spans that are usage."""

    span: Pattern
    quantity: _SpanQuantity = "spans"
    kind: Annotated[tuple[str, ...], _words(KINDS)] = ()
    status: Annotated[tuple[str, ...], _words(STATUSES)] = ()
    spans_are_complete: Literal["true"] | None = None
    sampled: Literal["allow"] | None = None

    @model_validator(mode="after")
    def _said(self) -> SpanSource:
        if self.spans_are_complete is None and self.sampled is None:
            raise wrong(
                "spans are often sampled, and what is missing would never be billed: say `spans_are_complete: true` if"
                " nothing samples between these services and here, or `sampled: allow` to bill whatever arrives"
            )
        if self.spans_are_complete is not None and self.sampled is not None:
            raise wrong("`spans_are_complete: true` and `sampled: allow` contradict each other; keep one")
        return self

    def check_level(self) -> str | None:
        """What is wrong with this source in a meter of levels, or None."""
        return "a span is an event and stands at no level; levels come from a `metric`"

    def check_unit(self, unit: str) -> str | None:
        """What is wrong between the meter's unit and this source, or None."""
        if self.factor is not None:
            return None
        if self.quantity == "duration" and unit != "s":
            return f"a duration is in s, the meter's unit is {unit!r}: say by which `factor`"
        if self.quantity == "spans" and not dimensionless(unit):
            return _NO_UNIT.format(what="a number of spans", unit=unit)
        if isinstance(self.quantity, Number) and self.source_unit not in (None, unit):
            return f"`source_unit` is {self.source_unit!r}, the meter's unit is {unit!r}: say by which `factor`"
        return None


def _signal(value: object) -> str | None:
    named = [key for key in ("metric", "span") if key in value] if isinstance(value, dict) else []
    return named[0] if len(named) == 1 else None


_Kind = TypeVar("_Kind", MetricSource, SpanSource)
SOURCES: Final[Mapping[str, type[_Source]]] = {"metric": MetricSource, "span": SpanSource}
Source: TypeAlias = MetricSource | SpanSource
_AnySource = Annotated[
    Annotated[MetricSource, Tag("metric")] | Annotated[SpanSource, Tag("span")],
    Discriminator(
        _signal,
        custom_error_type="catalog",
        custom_error_message="a source is either `metric: name` or `span: name`, with one of them",
    ),
]


def _sum_or_level(value: object) -> object:
    if value in ("count", "max", "latest", "unique", "average", "integral"):
        raise wrong(f"what a period is billed by ({value}) is said in the plans file; here it is sum or level")
    return one_of(("sum", "level")).func(value)  # type: ignore[call-arg]


class Meter(Value):
    """What an account is billed by, and where it comes from. Of the sources that fit an item, the first counts it."""

    unit: Annotated[Unit, AfterValidator(_ucum)]
    aggregation: Annotated[Literal["sum", "level"], BeforeValidator(_sum_or_level)] = "sum"
    """Amounts, which are added up, or levels: what gauges and UpDownCounters stand at."""
    sources: Annotated[tuple[_AnySource, ...], BeforeValidator(_some)]

    @model_validator(mode="after")
    def _sources_fit(self) -> Meter:
        for place, source in enumerate(self.sources):
            problem = source.check_level() if self.has_levels else None
            if problem := problem or source.check_unit(self.unit):
                raise wrong(f"sources[{place}]: {problem}")
        return self

    @property
    def has_levels(self) -> bool:
        """True for a meter of levels, which no sum can hold; False for one of amounts."""
        return self.aggregation == "level"


@dataclass(frozen=True, slots=True)
class Rules:
    """A file of meters."""

    meters: Mapping[str, Meter]
    file: str = "meters.yaml"
    lines: Mapping[str, int] = field(default_factory=dict)
    """Where each meter stands."""

    def of(self, tenant: str) -> Rules:
        """The same, less the meters that take nothing of this tenant's."""
        meters = {name: one for name, one in self.meters.items() if any(each.is_of(tenant) for each in one.sources)}
        return replace(self, meters=meters)

    def tenants(self) -> Mapping[str, str]:
        """The tenants that sources name, each with the first meter that does."""
        found: dict[str, str] = {}
        for name, meter in self.meters.items():
            for source in meter.sources:
                for tenant in source.tenants:
                    found.setdefault(tenant, name)
        return found

    def sources(self, kind: type[_Kind]) -> Sequence[tuple[str, Meter, int, _Kind]]:
        """(meter's name, meter, source's place, source) of one signal, in the file's order."""
        return [
            (name, meter, place, source)
            for name, meter in self.meters.items()
            for place, source in enumerate(meter.sources)
            if isinstance(source, kind)
        ]
