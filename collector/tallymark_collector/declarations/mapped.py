"""The meters of a file of meters, beside those of code."""

from __future__ import annotations

from tallymark_collector.declarations.api import Function
from tallymark_collector.declarations.comparison import Finding, PlansFile, compare
from tallymark_collector.declarations.scanner import Use
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
    return [finding for finding in compare(uses_of(rules), (), plans) if finding.rule in wrong]
