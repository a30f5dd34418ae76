"""Tokens: what they look like, and what is kept of them.

    tmk_<id>_<secret><checksum>        tmk_ + 12 + _ + 43 + 6 characters

`tmk_` and the form let a scanner find one in a place where it should not be, and the checksum tells it from a text that
looks alike. The id is public: it stands in lists and logs. The secret is 43 characters of 62, which is 256 bits.

What is stored is the token's SHA-256. A slow hash (bcrypt, Argon2) makes up for passwords that can be guessed; nobody
guesses 256 random bits, so all that it would add is a way to keep the collector busy. For the same reason no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Final

PREFIX: Final = "tmk"
ID_LENGTH: Final = 12
SECRET_LENGTH: Final = 43
CHECKSUM_LENGTH: Final = 6

_ID: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

ID_PATTERN: Final = re.compile(rf"[{_ID}]{{{ID_LENGTH}}}", re.ASCII)
_PATTERN: Final = re.compile(
    rf"{PREFIX}_(?P<id>[{_ID}]{{{ID_LENGTH}}})_(?P<secret>[0-9A-Za-z]{{{SECRET_LENGTH}}})"
    rf"(?P<checksum>[0-9A-Za-z]{{{CHECKSUM_LENGTH}}})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token in the hands of whoever made or sent it."""

    id: str
    text: str = field(repr=False)
    """The whole of it: a secret."""

    def verifier(self) -> bytes:
        """What is stored instead of it: 32 bytes."""
        return hashlib.sha256(self.text.encode()).digest()

    def matches(self, verifier: bytes) -> bool:
        """True if that was made of this token. Takes the same time wherever they differ."""
        return hmac.compare_digest(self.verifier(), verifier)


def make() -> Token:
    """A new token."""
    return of(new_id(), "".join(secrets.choice(_BASE62) for _ in range(SECRET_LENGTH)))


def new_id() -> str:
    """A credential's public name: 60 random bits."""
    return "".join(secrets.choice(_ID) for _ in range(ID_LENGTH))


def of(identity: str, secret: str) -> Token:
    """The token of an id and a secret."""
    start = f"{PREFIX}_{identity}_{secret}"
    return Token(identity, start + _checksum(start))


def read(text: str) -> Token | None:
    """The token that a text is, or None. The checksum finds slips, not forgeries: anybody can compute it."""
    found = _PATTERN.fullmatch(text)
    if found is None or _checksum(text[:-CHECKSUM_LENGTH]) != found["checksum"]:
        return None
    return Token(found["id"], text)


def find(text: str) -> bool:
    """True if what looks like a token stands anywhere in the text."""
    return _PATTERN.search(text) is not None


def _checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_BASE62))
        digits = _BASE62[digit] + digits
    return digits
