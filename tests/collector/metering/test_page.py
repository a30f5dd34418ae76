"""docs/meters.md: what it shows is a file of meters, and it shows every field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tallymark_collector.metering import parse_rules
from tallymark_collector.metering.rules import AccountFrom, Meter, MetricSource, SpanSource

PAGE = (Path(__file__).parents[3] / "docs" / "meters.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_files_of_meters(example: str) -> None:
    assert parse_rules(example).meters


def test_every_field_is_told() -> None:
    assert len(EXAMPLES) >= 4
    for model in (Meter, MetricSource, SpanSource, AccountFrom):
        for name in model.model_fields:
            assert f"`{name}`" in PAGE or name == "attribute"
