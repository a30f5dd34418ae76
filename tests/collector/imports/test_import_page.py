"""The mappings and fields that docs/import.md shows are those that the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tallymark_collector.imports import times
from tallymark_collector.imports.access_log import COMBINED
from tallymark_collector.imports.mapping import parse_mapping

PAGE = (Path(__file__).parents[3] / "docs" / "import.md").read_text()
MAPPINGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_there_are_both_kinds() -> None:
    assert [text.partition("format: ")[2].split()[0] for text in MAPPINGS] == ["combined", "csv"]


@pytest.mark.parametrize("text", MAPPINGS)
def test_a_mapping_of_the_page(text: str) -> None:
    parse_mapping(text, "docs/import.md")


def test_every_field_of_a_log_is_named() -> None:
    assert [name for name in (*COMBINED, *times.FORMATS) if f"`{name}`" not in PAGE] == []
