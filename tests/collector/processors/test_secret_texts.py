"""Whatever a text is made of: looking for credentials ends, finds the same again, and takes nothing else away."""

from __future__ import annotations

import random

import pytest

from tallymark_collector.processors.redaction import STANDARD
from tallymark_collector.processors.secret_texts import REDACTED, without_secrets

PIECES = [
    *("password", "token", "api_key", "session", "code", "key", "Authorization", "authorization", "Bearer", "basic"),
    *("-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----", "-----BEGIN ", "PRIVATE KEY", "-----"),
    *("eyJhbGciOiJIUzI1NiJ9", "eyJ", "abcde12345", "sk_live_", "sk-", "ghp_", "AKIA", "IOSFODNN7EXAMPLE", "tmk_a_"),
    *("https://", "//", "user", "@", "shop.example", "dXNlcjpwYXNz", REDACTED, "x", "7", "é"),
    *("=", ":", ": ", " ", "\n", "?", "&", "#", ";", ",", "/", ".", "-", "_", "\\", '"', "'", "{", "}", '\\"', '": "'),
]
HOSTILE = [
    *PIECES,
    *(
        begun + end
        for begun in ("eyJaaaaa", "//a:", "password=", '"password": "', "authorization: ", "bearer ", "AKIA")
        for end in ".-@\"\\' "
    ),
    *("-eyJaaaaa", "-----BEGIN PRIVATE KEY-----", "aaaaaaaa.", "eyJaaaaa.eyJaaaaa-", '\\"token\\":', "a=", "?a"),
    *("=password", "authorization:authorization", "bearer bearer ", "password='", 'password="', "sk_live_sk_live_"),
]
SHAPES = [
    *("Bearer {}", "authorization: {}", "password={}", 'secret="{}"', '{{"token": "{}"}}', "https://a:{}@b.example/"),
    *("https://b.example/?otp={}", "sk_live_{}", "ghp_{}", "eyJhbGciOiJub25lIn0.{}.{}"),
]
SIZE = 100_000
"""Characters: by these squared nobody would wait for it."""


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_is_gone_through_again_and_again(piece: str) -> None:
    text = piece * (SIZE // len(piece))
    for one in (f"a=b {text}", f'"{text}@', f"eyJ{text}"):
        found = without_secrets(one)
        assert without_secrets(found) == found


@pytest.mark.parametrize("seed", range(20))
def test_what_is_redacted_stays_as_it_is(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        found = without_secrets(text)
        assert without_secrets(found) == found, text
        assert STANDARD.text(text) == found


@pytest.mark.parametrize("seed", range(5))
def test_a_secret_is_found_wherever_it_stands_between_words(seed: int) -> None:
    rng = random.Random(seed)
    words = ["the", "call", "of", "acme", "took", "17", "ms:", "(twice)", "GET", "/v1/orders", "200,", "it's", "a=b"]
    for _ in range(300):
        secret = "".join(rng.choices("ABCDEFghijkl0123456789", k=20)) + "7"
        shape = rng.choice(SHAPES)
        before, after = (rng.choices(words, k=rng.randint(0, 4)) for _ in range(2))
        text = " ".join([*before, shape.format(secret, secret), *after])
        found = without_secrets(text)
        assert secret not in found, text
        assert REDACTED in found
        assert found.split(REDACTED)[0].split()[: len(before)] == before
        assert found.split()[len(found.split()) - len(after) :] == after
