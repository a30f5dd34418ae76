"""What does not fit: between the places of a code base, and between them and its plans."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tallymark_collector.billing.fields import OF_ANY_SUM
from tallymark_collector.billing.plans import Catalog, FlatFee
from tallymark_collector.declarations.api import UNDECLARED_UNIT, Function
from tallymark_collector.declarations.scanner import NoUnit, Use
from tallymark_collector.declarations.sources import Unreadable
from tallymark_collector.documents.fields import near


class Severity(str, enum.Enum):
    """Whether usage will be lost to billing, or may be."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """Something that does not fit. `rule` is one word for programs."""

    file: str
    line: int
    severity: Severity
    rule: str
    message: str

    def __str__(self) -> str:
        """`app.py:12: error: what does not fit and what to do`."""
        return f"{self.file}:{self.line}: {self.severity.value}: {self.message}"


@dataclass(frozen=True)
class Meter:
    """A meter of the code base in one unit; `unit` None where that is computed at run time. `plans` price it."""

    name: str
    unit: str | None
    uses: tuple[Use, ...]
    plans: tuple[str, ...]


@dataclass(frozen=True)
class PlansFile:
    """A catalogue, its name, and the line of each meter in it."""

    name: str
    catalog: Catalog
    lines: Mapping[str, int]


def meters_of(uses: Iterable[Use], plans: PlansFile | None) -> list[Meter]:
    """The meters of a code base, by name and unit. A recording without a unit has that of the meter's declaration."""
    found: dict[tuple[str, str | None], list[Use]] = defaultdict(list)
    by_name: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        if use.meter is not None:
            by_name[use.meter].append(use)
    priced = {} if plans is None else _priced(plans.catalog)
    for name, several in by_name.items():
        own = _declared_unit(several)
        for use in several:
            found[name, _unit(use, own)].append(use)
    keys = sorted(found, key=lambda key: (key[0], key[1] or ""))
    return [Meter(name, unit, tuple(found[name, unit]), tuple(priced.get(name, ()))) for name, unit in keys]


def compare(uses: Sequence[Use], unreadable: Iterable[Unreadable], plans: PlansFile | None) -> list[Finding]:
    """Everything that does not fit, by file and line."""
    findings = [Finding(file.name, file.line, Severity.ERROR, "unreadable", file.message) for file in unreadable]
    findings += [
        Finding(use.file, use.line, Severity.WARNING, "computed-name", f"{use.written}; it is not checked")
        for use in uses
        if use.meter is None
    ]
    by_name: dict[str, list[Meter]] = defaultdict(list)
    for meter in meters_of(uses, plans):
        by_name[meter.name].append(meter)
    for name, meters in by_name.items():
        findings += _units(name, meters, plans)
        if plans is not None:
            findings += _pricing(name, meters, plans)
    if plans is not None:
        findings += _never_recorded(set(by_name), any(use.meter is None for use in uses), plans)
    return sorted(findings, key=lambda finding: (finding.file, finding.line, finding.message))


def _priced(catalog: Catalog) -> dict[str, list[str]]:
    priced: dict[str, list[str]] = defaultdict(list)
    for plan in catalog.plans.values():
        for charge in plan.charges:
            if not isinstance(charge, FlatFee):
                priced[charge.meter].append(plan.id)
    return priced


def _declared_unit(uses: Iterable[Use]) -> str | NoUnit:
    """What a recording without a unit inherits."""
    declared = [use.unit for use in uses if use.function is Function.TRACK]
    return declared[0] if declared else UNDECLARED_UNIT


def _unit(use: Use, declared: str | NoUnit) -> str | None:
    unit = declared if use.unit is NoUnit.INHERITED else use.unit
    return unit if isinstance(unit, str) else None


def _units(name: str, meters: Sequence[Meter], plans: PlansFile | None) -> Iterable[Finding]:
    known = None if plans is None else plans.catalog.meters.get(name)
    first = min(_places(meters), key=lambda use: (use.function is not Function.TRACK, use.file, use.line))
    of_first = next(meter.unit for meter in meters if first in meter.uses)
    for meter in meters:
        for use in meter.uses:
            if meter.unit is None:
                if use.unit is NoUnit.COMPUTED:
                    message = f"the unit of meter {name!r} is computed at run time and not checked; write unit=…"
                    yield Finding(use.file, use.line, Severity.WARNING, "computed-unit", message)
            elif known is not None and plans is not None and meter.unit != known.unit:
                where = f"{plans.name}:{plans.lines.get(name, 1)}"
                message = f"meter {name!r} has the unit {meter.unit!r} here and {known.unit!r} in {where}: not priced"
                yield Finding(use.file, use.line, Severity.ERROR, "unit-mismatch", message)
            elif of_first is not None and meter.unit != of_first:
                message = (
                    f"meter {name!r} has the unit {meter.unit!r} here and {of_first!r} in {first.file}:{first.line}:"
                    " one meter has one unit"
                )
                yield Finding(use.file, use.line, Severity.ERROR, "unit-mismatch", message)


def _pricing(name: str, meters: Sequence[Meter], plans: PlansFile) -> Iterable[Finding]:
    first = min(_places(meters), key=lambda use: (use.file, use.line))
    if name not in plans.catalog.meters:
        meant = near(name, plans.catalog.meters, "; did you mean ")
        message = f"meter {name!r} is not in {plans.name}{meant}: nobody is billed for it"
        yield Finding(first.file, first.line, Severity.ERROR, "unknown-meter", message)
    elif not meters[0].plans:
        message = f"meter {name!r} is in {plans.name}, but no plan has a charge for it: nobody is billed for it"
        yield Finding(first.file, first.line, Severity.ERROR, "unpriced-meter", message)
    # What a file of meters takes is not the SDK's: `mapped` knows what it is made of.
    by_code = [use for use in _places(meters) if use.function is not Function.MAP]
    known = plans.catalog.meters.get(name) if by_code else None
    if known is not None and known.aggregation not in OF_ANY_SUM:
        first = min(by_code, key=lambda use: (use.file, use.line))
        where = f"{plans.name}:{plans.lines.get(name, 1)}"
        message = (
            f"meter {name!r} is billed by its {known.aggregation} ({where}), which needs a point for each event, or"
            " levels, and the SDK sends sums over an interval: no invoice can be made of it. Bill it by sum or unique"
        )
        yield Finding(first.file, first.line, Severity.ERROR, "aggregation-mismatch", message)


def _never_recorded(recorded: set[str], more: bool, plans: PlansFile) -> Iterable[Finding]:
    for name, by in _priced(plans.catalog).items():
        if name not in recorded:
            meant = near(name, recorded, "; did you mean ")
            unless = ", as far as names are not computed at run time" if more else ""
            message = f"meter {name!r} is priced ({', '.join(by)}) and nothing records it{unless}{meant}"
            yield Finding(plans.name, plans.lines.get(name, 1), Severity.WARNING, "never-recorded", message)


def _places(meters: Iterable[Meter]) -> list[Use]:
    return [use for meter in meters for use in meter.uses]
