"""What a token looks like, and that it is told from what it is not."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from pathlib import Path

import pytest

from tallymark_collector.access import tokens

PAGE = (Path(__file__).parents[3] / "docs" / "access.md").read_text("utf-8")
FORM = re.compile(*re.findall(r"Scanners\s+find\s+tokens\s+by\s+`([^`]+)`", PAGE))
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_token_has_256_random_bits_and_a_form_that_scanners_find() -> None:
    made = [tokens.make() for _ in range(200)]
    assert all(FORM.fullmatch(token.text) for token in made)
    assert tokens.SECRET_LENGTH * math.log2(62) >= 256
    assert len({token.text for token in made}) == len({token.id for token in made}) == 200
    secrets = "".join(token.text[17:60] for token in made)
    assert set(secrets) == set(DIGITS), "8,600 characters: each of the 62 is among them"


def test_the_checksum_is_a_crc32_in_base_62() -> None:
    text = tokens.make().text
    assert sum(DIGITS.index(digit) * 62**place for place, digit in enumerate(reversed(text[-6:]))) == zlib.crc32(
        text[:-6].encode()
    )


def test_a_token_is_read_as_it_was_made_and_never_shown() -> None:
    token = tokens.make()
    assert tokens.read(token.text) == token
    assert token.verifier() == hashlib.sha256(token.text.encode("ascii")).digest()
    assert token.matches(token.verifier())
    assert not token.matches(tokens.make().verifier())
    assert token.text[17:60] not in repr(token)


@pytest.mark.parametrize(
    "spoil",
    [
        str.upper,
        str.swapcase,
        lambda text: text.replace("tmk_", "TMK_"),
        lambda text: f" {text}",
        lambda text: f"{text}\n",
        lambda text: text[:-1],
        lambda text: text + "0",
        lambda text: text[:30] + ("a" if text[30] != "a" else "b") + text[31:],
        lambda text: text[:30] + "é" + text[31:],
        lambda text: text[:30] + "\uff11" + text[31:],
        lambda text: text[:30] + "\0" + text[31:],
        lambda text: text[4:],
        lambda _: "",
    ],
)
def test_anything_else_is_no_token(spoil) -> None:  # type: ignore[no-untyped-def]
    assert tokens.read(spoil(tokens.make().text)) is None


def test_a_token_is_found_inside_a_text() -> None:
    assert tokens.find(f"note: {tokens.make().text}.")
    assert not tokens.find("note: tmk_abc")
