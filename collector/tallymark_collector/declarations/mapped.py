"""The meters of a file of meters, beside those of code."""

from __future__ import annotations

from collections.abc import Iterator

from tallymark_collector.billing.fields import OF_ANY_SUM, OF_LEVELS
from tallymark_collector.declarations.api import Function
from tallymark_collector.declarations.comparison import Finding, PlansFile, Severity, compare
from tallymark_collector.declarations.scanner import Use
from tallymark_collector.documents.problems import Problem
from tallymark_collector.metering import Rules


def uses_of(rules: Rules) -> list[Use]:
    """One for each meter, where it stands in the file."""
    return [
        Use(rules.file, rules.lines.get(name, 1), Function.MAP, name, meter.unit)
        for name, meter in rules.meters.items()
    ]


def mismatches(rules: Rules, plans: PlansFile) -> list[Finding]:
    """What does not fit between the two files. That plans price more than the file maps is no mistake: code records."""
    wrong = ("unknown-meter", "unit-mismatch")
    found = [finding for finding in compare(uses_of(rules), (), plans) if finding.rule in wrong]
    return sorted([*found, *aggregations(rules, plans)], key=lambda one: (one.file, one.line, one.message))


def aggregations(rules: Rules, plans: PlansFile) -> Iterator[Finding]:
    """Meters whose aggregation in the plans is none of what the file makes them of: levels, or increases."""
    for name, meter in rules.meters.items():
        known = plans.catalog.meters.get(name)
        if known is None or known.aggregation in (OF_LEVELS if meter.has_levels else _OF_INCREASES):
            continue
        where = f"{plans.name}:{plans.lines.get(name, 1)}"
        if meter.has_levels:
            why = (
                f"is made of levels, and billed by its {known.aggregation} ({where}), which levels have not: no invoice"
                f" shows it. Bill it by {_listed(OF_LEVELS)}"
            )
        else:
            why = (
                f"is made of increases, and billed by its {known.aggregation} ({where}), which levels alone have: no"
                " invoice can be made of it. Say `aggregation: level` here if gauges or UpDownCounters feed it"
            )
        line = rules.lines.get(name, 1)
        yield Finding(rules.file, line, Severity.ERROR, "aggregation-mismatch", f"meter {name!r} {why}")


def unsaid(plans: PlansFile, rules: Rules | None = None) -> list[Problem]:
    """Meters of which the plans do not say what several processes come to that tell a level, where that matters most: a
    peak, or a count at the end. Those that `rules` makes of increases tell none."""
    found = []
    for name, meter in plans.catalog.meters.items():
        mapped = None if rules is None else rules.meters.get(name)
        if meter.aggregation not in ("max", "latest") or meter.across is not None:
            continue
        if mapped is not None and not mapped.has_levels:
            continue
        why = (
            f"is not said: of levels (gauges, UpDownCounters) the {meter.aggregation} is then of the sum over all"
            " processes that tell one, so while a deploy replaces a process both are counted, until the old one ends"
            " or is stale. Where they tell of the same thing, say `across: latest`; where each has a part of it,"
            " `across: sum`"
        )
        found.append(Problem(plans.name, plans.lines.get(name, 1), 1, f"meters.{name}.across", why))
    return found


_OF_INCREASES = OF_ANY_SUM | {"count", "max", "latest"}
"""The last three of single events, such as spans are."""


def _listed(names: frozenset[str]) -> str:
    *some, last = sorted(names)
    return f"{', '.join(some)} or {last}"
