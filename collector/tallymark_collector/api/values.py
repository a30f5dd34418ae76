"""Between protobuf's values and ours: times, lengths of time, quantities, and where a page goes on."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from tallymark_collector.errors import UserError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SECOND: Final = 1_000_000_000
_FIRST_YEAR: Final = 1900
_LAST_YEAR: Final = 9998
"""Hours and days around a time are times, too."""


def instant(request: Message, name: str) -> datetime | None:
    """The time in a request's field, None where it is absent. Raises UserError where it is none, or finer than a
    microsecond: the database keeps no finer ones, and a bound that moved would be another range."""
    if not request.HasField(name):
        return None
    given: Timestamp = getattr(request, name)
    if not 0 <= given.nanos < _SECOND or given.nanos % 1000:
        raise UserError(f"{name}: nanos are {given.nanos}, and have to be whole microseconds, 0 to 999,999,000")
    try:
        found = _EPOCH + timedelta(seconds=given.seconds, microseconds=given.nanos // 1000)
    except OverflowError:
        found = None
    if found is None or not _FIRST_YEAR <= found.year <= _LAST_YEAR:
        raise UserError(f"{name}: {given.seconds} s since 1970 is no time of the years {_FIRST_YEAR} to {_LAST_YEAR}")
    return found


def timestamp(moment: datetime | None) -> Timestamp | None:
    """An aware time as protobuf has it, to the microsecond."""
    if moment is None:
        return None
    found = Timestamp()
    found.FromDatetime(moment)
    return found


def length(request: Message, name: str) -> timedelta | None:
    """The length of time in a request's field, None where it is absent. Raises UserError where it is none."""
    if not request.HasField(name):
        return None
    given: Duration = getattr(request, name)
    try:
        return timedelta(seconds=given.seconds, microseconds=given.nanos // 1000)
    except OverflowError:
        raise UserError(f"{name}: {given.seconds} s is no length of time that can be added to now") from None


def digits(quantity: Decimal) -> str:
    """A quantity, exact, without an exponent."""
    return f"{quantity:f}"


def page_size(asked: int, usual: int, most: int) -> int:
    """How many a page has. Raises UserError."""
    if not 0 <= asked <= most:
        raise UserError(f"page_size is {asked}, and has to be 0 (which is {usual:,}) to {most:,}")
    return asked or usual


def page_token(request: Message, after: Sequence[str | None]) -> str:
    """What the next page of the same question is asked with."""
    return base64.urlsafe_b64encode(json.dumps([_question(request), *after], ensure_ascii=False).encode()).decode()


def page_after(request: Message, parts: int) -> tuple[str | None, ...] | None:
    """Where the page that is asked for goes on: so many parts, or None for the first. Raises UserError where the token
    was not given for this question. It holds no right to anything: what may be seen is decided by the credential."""
    token: str = getattr(request, "page_token")  # noqa: B009 - of whatever message has one
    if not token:
        return None
    try:
        found: Any = json.loads(base64.b64decode(token.encode(), b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        found = None
    if (
        not isinstance(found, list)
        or len(found) != parts + 1
        or found[0] != _question(request)
        or not all(part is None or (isinstance(part, str) and _is_text(part)) for part in found[1:])
    ):
        raise UserError(
            "page_token was not given for this question: send it with everything else as it was, or none to begin anew"
        )
    return tuple(found[1:])


def _is_text(part: str) -> bool:
    return part.isprintable() or not any("\ud800" <= character <= "\udfff" or character == "\0" for character in part)


def _question(request: Message) -> str:
    """What of a request stays the same from page to page."""
    question = type(request)()
    question.CopyFrom(request)
    for name in ("page_token", "page_size"):
        question.ClearField(name)
    return hashlib.sha256(question.SerializeToString(deterministic=True)).hexdigest()[:16]
