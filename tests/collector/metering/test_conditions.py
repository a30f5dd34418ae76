"""Patterns of a file of meters: the texts that they mean, in time that nobody can stretch."""

from __future__ import annotations

import fnmatch
import re

from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.metering.conditions import Glob


@given(st.text("ab*?\n.", max_size=8), st.text("ab*?\n.", max_size=12))
def test_a_star_stands_for_any_characters_and_a_question_mark_for_one(pattern: str, text: str) -> None:
    """Held against Python's own patterns for files, which call `[` something else."""
    expected = re.match(fnmatch.translate(pattern), text) is not None
    assert Glob(pattern).matches(text) is expected
    assert Glob(pattern, literal=True).matches(text) is (pattern == text)


def test_a_name_as_long_as_a_request_is_looked_through_once() -> None:
    """Tried place by place, three stars in a text of a million characters are hours of the event loop."""
    text = "ab" * 500_000
    assert not Glob("*b*a*b*c").matches(text)
    assert Glob("*b*a*b*a?").matches(text)
