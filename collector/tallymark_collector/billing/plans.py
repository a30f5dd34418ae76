"""Plans, their charges, and who is subscribed to them: frozen values that check themselves.

The same shape is read from the catalogue file and kept as a JSON document, so there is one format to know.
A charge's kind is told by the one field among `flat`, `unit_price`, `graduated` and `volume` that it has.

Quantities and prices are `Decimal`, in documents plain text ("0.0005"). What breaks a rule raises pydantic's
`ValidationError`, which is a `ValueError`.
"""

import hashlib
import json
from calendar import month_name, monthrange
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, TypeAlias
from zoneinfo import ZoneInfo

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from tallymark import conventions
from tallymark_collector.billing.fields import (
    OF_LEVELS,
    Across,
    AggregationName,
    AnchorDay,
    AnchorMonth,
    AnchorWeekday,
    CurrencyCode,
    Cycle,
    Day,
    Fee,
    MeterName,
    Number,
    PlanId,
    Seconds,
    ZoneName,
    check_decimals,
    maybe_number,
)
from tallymark_collector.billing.local_days import exists
from tallymark_collector.billing.money import canonical, minor_digits
from tallymark_collector.documents.fields import Text, Unit, Value, Where, listed, near, part, wrong

ZERO: Final = Decimal(0)
DEFAULT_STALE: Final = 300
"""Seconds for which a level holds without another sample: five times OpenTelemetry's usual interval. Documents leave it
out, so it can never change (store/sql has it, too)."""
_A_LEAP_YEAR: Final = 2000


class Tier(Value):
    """A price up to and including a quantity, counted from the first unit after the included ones.

    `up_to` is None for the last tier. `flat` is charged once if the tier prices any quantity.
    """

    up_to: Number | None = None
    unit_price: Number
    flat: Fee = ZERO


def _tier_order(tiers: Sequence[object]) -> Iterable[tuple[Where, str]]:
    if not tiers:
        yield (), "needs at least one tier, e.g. - {unit_price: 0.0005}"
    reached = ZERO
    for place, tier in enumerate(tiers):
        is_last = place == len(tiers) - 1
        written = part(tier, "up_to")
        if is_last:
            if written is not None:
                yield (place, "up_to"), "the last tier is open; leave `up_to` out, or add a tier without it"
            return
        if written is None:
            yield (place, "up_to"), "only the last tier may be open; say where this one ends"
        bound = maybe_number(written)
        if bound is None:
            continue
        if bound <= reached:
            why = f"the tier before it ends at {canonical(reached)}" if reached else "a tier holds something"
            yield (place, "up_to"), f"must be above {canonical(reached)}: {why}"
        reached = max(bound, reached)


Tiers = Annotated[tuple[Tier, ...], listed(_tier_order)]


class FlatFee(Value):
    """A fee per period, whole also for a period that began or ended early."""

    flat: Fee
    name: Text | None = None


class _Metered(Value):
    """`included` units of the meter are free in each period, whole also for a shortened one."""

    meter: MeterName
    included: Number = ZERO
    name: Text | None = None


class PerUnit(_Metered):
    """One price for every unit."""

    unit_price: Number


class Graduated(_Metered):
    """Each tier prices the units that fall into it."""

    graduated: Tiers


class Volume(_Metered):
    """The tier that the whole quantity reaches prices all of it."""

    volume: Tiers


MeteredCharge: TypeAlias = PerUnit | Graduated | Volume

KINDS: Final[Mapping[str, type[Value]]] = {
    "flat": FlatFee,
    "unit_price": PerUnit,
    "graduated": Graduated,
    "volume": Volume,
}
"""The field that tells a charge's kind, and the kind."""

_ONE_KIND = "a charge has exactly one of `flat`, `unit_price`, `graduated`, `volume`; make one charge of each"


def kind_of(charge: object) -> str | None:
    """The kind's field, also where it is only nearly spelled right; None where there is none or several."""
    if not isinstance(charge, dict):
        return next((kind for kind, model in KINDS.items() if isinstance(charge, model)), None)
    given = [kind for kind in KINDS if kind in charge]
    if not given:
        other = {"meter", "included", "name"}
        given = [guess for key in charge if key not in other and (guess := near(str(key), KINDS, ""))]
    return given[0] if len(given) == 1 else None


Charge = Annotated[
    Annotated[FlatFee, Tag("flat")]
    | Annotated[PerUnit, Tag("unit_price")]
    | Annotated[Graduated, Tag("graduated")]
    | Annotated[Volume, Tag("volume")],
    Discriminator(kind_of, custom_error_type="catalog", custom_error_message=_ONE_KIND),
]


def _one_charge_per_meter(charges: Sequence[object]) -> Iterable[tuple[Where, str]]:
    seen: set[str] = set()
    for place, charge in enumerate(charges):
        meter = part(charge, "meter")
        if isinstance(meter, str) and meter in seen:
            yield (place, "meter"), f"{meter!r} has a charge in this plan already; a quantity is priced once"
        elif isinstance(meter, str):
            seen.add(meter)


class Aggregation(Value):
    """What of a meter's usage is a period's quantity, where that is not the sum (see store/sql, usage_aggregated).

    `count`: how many points. `max`, `latest`: the quantity of the largest and of the last one, or the level. `unique`:
    how many different values the attribute `of` had. `average`, `integral`: of levels, over the period and times hours.
    `across` and `stale_after` (seconds) say what levels come to.
    """

    aggregation: AggregationName
    of: Text | None = None
    across: Across = "sum"
    stale_after: Seconds = DEFAULT_STALE

    def unit(self, metered: str) -> str:
        """What the quantity counts, in UCUM, of a meter with that unit."""
        hours = f"{metered}.h" if metered else "h"
        return {"count": "{event}", "unique": f"{{{self.of}}}", "integral": hours}.get(self.aggregation, metered)

    def __str__(self) -> str:
        """For people: `max`, `unique user.id`."""
        return f"{self.aggregation} {self.of}" if self.of else self.aggregation


class PlanTerms(Value):
    """What a person writes about a plan."""

    name: Text | None = None
    charges: Annotated[tuple[Charge, ...], listed(_one_charge_per_meter)]


class Plan(PlanTerms):
    """A plan that can be priced on its own: with its currency, and `units` by each meter that it charges for.

    `aggregations` has the meters among them that are not summed. They are part of the plan, as prices are: a period
    that is priced again by its version of the plan has the same quantities.
    """

    id: Text
    currency: CurrencyCode
    units: dict[Text, Unit] = Field(default_factory=dict)
    aggregations: dict[Text, Aggregation] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> "Plan":
        digits = minor_digits(self.currency)
        meters = [charge.meter for charge in self.charges if not isinstance(charge, FlatFee)]
        if sorted(meters) != sorted(self.units):
            raise wrong(f"units are needed for the meters {sorted(meters)}, got {sorted(self.units)}")
        if unknown := sorted(set(self.aggregations) - set(meters)):
            raise wrong(f"aggregations are for the meters {sorted(meters)}, got {unknown} besides")
        for charge in self.charges:
            if isinstance(charge, FlatFee):
                check_decimals(charge.flat, digits)
            elif not isinstance(charge, PerUnit):
                for tier in charge.graduated if isinstance(charge, Graduated) else charge.volume:
                    check_decimals(tier.flat, digits)
        return self

    @property
    def version(self) -> str:
        """16 hexadecimal digits that follow from the plan's content: equal plans have equal versions.

        "0.10" and "0.1" are the same price, and the order of `units` means nothing. The order of charges does:
        it is the order of the invoice's lines.
        """
        content = json.dumps(_canonical(self.model_dump(exclude_defaults=True)), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_document(self) -> dict[str, Any]:
        """JSON-able: text, lists and mappings, every number as plain text.

        A field at its default is left out, so that a field added later leaves the documents (and versions) of
        older plans as they are.
        """
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Plan":
        """The plan that `to_document` wrote. Raises `ValueError` where it is not one."""
        return cls.model_validate(dict(document))


def _canonical(value: Any) -> Any:
    if isinstance(value, Decimal):
        return canonical(value)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list | tuple) else value


class SubscriptionTerms(Value):
    """What a person writes about an account's subscription.

    From the local day `since` on and before the local day `until` (open where None), billed in periods that
    begin on the anchor of each `cycle`, at local midnight in `time_zone` (see `periods`). Only what the cycle
    has may be given, and what it does not have is None: a year and a month have an `anchor_day` (1 if left
    out), a year an `anchor_month`, a week an `anchor_weekday`. The last two must be said, because a guess could
    make a first period of a few days at the full fee.
    """

    plan: PlanId
    time_zone: ZoneName = "UTC"
    cycle: Cycle = "monthly"
    anchor_day: AnchorDay | None = Field(default=None, validate_default=True)
    anchor_month: AnchorMonth | None = Field(default=None, validate_default=True)
    anchor_weekday: AnchorWeekday | None = Field(default=None, validate_default=True)
    since: Day
    until: Day | None = None

    @field_validator("anchor_day")
    @classmethod
    def _is_of_a_month(cls, day: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("cycle") != "weekly":
            return day or 1
        if day is not None:
            raise wrong("a weekly cycle has no day of the month; remove it and say `anchor_weekday`")
        return None

    @field_validator("anchor_month")
    @classmethod
    def _is_of_a_year(cls, month: int | None, info: ValidationInfo) -> int | None:
        cycle, day = info.data.get("cycle"), info.data.get("anchor_day") or 1
        if cycle == "yearly" and month is None:
            raise wrong("is required in a yearly cycle: the month, 1 to 12, in which each year begins")
        if cycle in ("monthly", "weekly") and month is not None:
            raise wrong(f"a {cycle} cycle has no month of its own; remove it, or say `cycle: yearly`")
        if month is not None and day > (longest := monthrange(_A_LEAP_YEAR, month)[1]):
            raise wrong(f"{month_name[month]} never has a day {day}; `anchor_day` can be {longest} at most")
        return month

    @field_validator("anchor_weekday")
    @classmethod
    def _is_of_a_week(cls, weekday: str | None, info: ValidationInfo) -> str | None:
        cycle = info.data.get("cycle")
        if cycle == "weekly" and weekday is None:
            raise wrong("is required in a weekly cycle: the day, monday to sunday, on which each week begins")
        if cycle in ("monthly", "yearly") and weekday is not None:
            raise wrong(f"a {cycle} cycle has no weekday; remove it, or say `cycle: weekly`")
        return weekday

    @field_validator("since", "until")
    @classmethod
    def _is_a_local_day(cls, day: Day | None, info: ValidationInfo) -> Day | None:
        zone = info.data.get("time_zone")
        if day is not None and zone is not None and not exists(day, ZoneInfo(zone)):
            raise wrong(f"{zone} had no {day}; use the day before or after")
        return day

    @field_validator("until")
    @classmethod
    def _is_after_since(cls, until: Day | None, info: ValidationInfo) -> Day | None:
        since = info.data.get("since")
        if until is not None and since is not None and until <= since:
            raise wrong(f"is the first day that is not covered, so at least {since + timedelta(days=1)}")
        return until


class Subscription(SubscriptionTerms):
    """One account on one plan."""

    account: Text

    def to_document(self) -> dict[str, Any]:
        """JSON-able; days as YYYY-MM-DD. `anchor_day` is a number; a field at its default is left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Subscription":
        """The subscription that `to_document` wrote. Raises `ValueError` where it is not one."""
        return cls.model_validate(dict(document))


class Meter(Value):
    """What is metered. `unit` is UCUM, as on the wire: "{request}", "By", "s"; "" where there is none.

    `aggregation` says what of it a period is billed by; `of` is the attribute whose values `unique` counts; of levels,
    `across` says what several producers of one series come to, and `stale_after` how long one holds.
    """

    unit: Unit
    aggregation: AggregationName = "sum"
    of: Text | None = Field(default=None, validate_default=True)
    across: Across | None = None
    stale_after: Seconds | None = None

    @field_validator("of")
    @classmethod
    def _is_of_unique(cls, attribute: str | None, info: ValidationInfo) -> str | None:
        aggregation = info.data.get("aggregation")
        if aggregation == "unique" and attribute is None:
            raise wrong("is required with `aggregation: unique`: the attribute whose values are counted, e.g. user.id")
        if aggregation not in ("unique", None) and attribute is not None:
            raise wrong(f"is for `aggregation: unique`; a {aggregation} is not of an attribute. Remove it")
        if attribute == conventions.ACCOUNT:
            raise wrong("names the account itself, which has one value for an account; name another attribute")
        return attribute

    @field_validator("across", "stale_after")
    @classmethod
    def _is_of_levels(cls, value: object, info: ValidationInfo) -> object:
        aggregation = info.data.get("aggregation")
        if value is not None and aggregation is not None and aggregation not in OF_LEVELS:
            known = ", ".join(sorted(OF_LEVELS))
            raise wrong(f"is for levels ({known}); a {aggregation} has none. Remove it")
        return value

    def aggregated(self) -> Aggregation | None:
        """How it is aggregated; None where it is summed."""
        if self.aggregation == "sum":
            return None
        return Aggregation(
            aggregation=self.aggregation,
            of=self.of,
            across=self.across or "sum",
            stale_after=self.stale_after or DEFAULT_STALE,
        )


class Catalog(Value):
    """Everything that a catalogue file says. `subscriptions` are in the file's order, an account's by time."""

    currency: CurrencyCode
    meters: dict[Text, Meter]
    plans: dict[Text, Plan]
    subscriptions: tuple[Subscription, ...]
