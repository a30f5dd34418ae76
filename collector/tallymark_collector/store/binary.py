"""Values as COPY's binary format has them (PostgreSQL's documentation, "COPY", "Binary Format").

A field is its length and its bytes in network order. The types are what the columns have: nothing is converted, so a
value of another width would be an error or, worse, another value.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from struct import pack
from typing import Final

import psycopg

HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
"""Signature, no flags, no extension."""
TRAILER: Final = b"\xff\xff"

EIGHT: Final = pack(">i", 8)
"""Length of a bigint or timestamptz."""
SIXTEEN: Final = pack(">i", 16)
"""Length of a uuid."""

_EPOCH_US: Final = 946_684_800_000_000  # 2000-01-01, where PostgreSQL's timestamps count from
_BASE: Final = 10_000  # numeric's digits are 0 to 9999
_NEGATIVE: Final = 0x4000
_MAX_SCALE: Final = 0x3FFF  # what PostgreSQL keeps of decimal places


def timestamptz(ns: int) -> bytes:
    """Nanoseconds since the Unix epoch, cut to the microsecond; without a length."""
    return pack(">q", ns // 1000 - _EPOCH_US)


def text(value: str) -> bytes:
    """A text field with its length."""
    data = value.encode()
    return pack(">i", len(data)) + data


@lru_cache(maxsize=65_536)
def numeric(digits: str) -> bytes:
    """A numeric field with its length, from a finite decimal's own text (two texts of one value may differ in scale).

    Raises psycopg.DataError, as the server does, for what numeric cannot hold.
    """
    sign, figures, exponent = Decimal(digits).as_tuple()
    if not isinstance(exponent, int):
        raise psycopg.DataError(f"{digits} is not a finite number")
    scale = max(0, -exponent)
    # The whole value as an integer of 10000ths: zeros behind it until its decimal places fill groups of four.
    coefficient = int("".join(map(str, figures)))
    places = -(-scale // 4)
    coefficient *= 10 ** (exponent + places * 4)
    groups: list[int] = []
    while coefficient:
        coefficient, group = divmod(coefficient, _BASE)
        groups.append(group)
    weight = len(groups) - places - 1
    while groups and not groups[0]:
        del groups[0]
    if scale > _MAX_SCALE or not -(2**15) <= weight < 2**15:
        raise psycopg.DataError(f"a numeric cannot hold {digits[:64]}")
    head = pack(">HhHH", len(groups), weight if groups else 0, _NEGATIVE if sign and groups else 0, scale)
    digits_data = pack(f">{len(groups)}h", *reversed(groups))
    return pack(">i", len(head) + len(digits_data)) + head + digits_data
