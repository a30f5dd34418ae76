"""Resources and scopes: what many points and spans share.

Each stream has a copy in the database, and so has each point or span in quarantine. So none may be large: usage beside
one that is stays whole, as one item of the quarantine, and is not taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Attributes, Reason, Refusal, attributes_json
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.sent import identifying

MAX_BYTES: Final = 256 * 1024
"""Of an encoded resource, and of a scope, as it came: some have a process's whole command line."""
MAX_STORED: Final = 32 * 1024
"""Characters of what is stored of either, as JSON, less what is redacted (a command line is). Those of a container in a
cluster, with its labels, take two or three thousand."""
MAX_ATTRIBUTES: Final = 256
"""Of either."""


MAX_UNREADABLE: Final = 4 * 1024
"""Bytes of one that cannot be read, which each of its points is refused with."""


class DescribedResource(NamedTuple):
    """A resource, decoded."""

    attributes: Attributes
    sender: Attributes
    """Those of the attributes that say which process it is."""
    stored: Attributes
    """The attributes as they may be stored; the same object where nothing is redacted."""
    refusal: Refusal | None
    """Why usage beside it is kept as one, if it is too large."""


class DescribedScope(NamedTuple):
    """A scope, decoded."""

    name: str
    version: str
    attributes: Attributes
    refusal: Refusal | None


def resource_of(data: bytes, redaction: Redaction) -> DescribedResource:
    """Decodes a Resource message. Raises MalformedRequest."""
    attributes = wire.decode_resource(data)
    stored = redaction.attributes(attributes)
    return DescribedResource(attributes, identifying(attributes), stored, _check("resource", stored))


def scope_of(data: bytes, redaction: Redaction) -> DescribedScope:
    """Decodes an InstrumentationScope message. Raises MalformedRequest."""
    found = wire.decode_scope(data)
    attributes = wire.decode_attributes(found.attributes)
    refusal = _check("scope", redaction.attributes(attributes), len(found.name) + len(found.version))
    return DescribedScope(found.name, found.version, attributes, refusal)


def scope_name(data: bytes) -> str:
    """The name in an InstrumentationScope message of any size, whose attributes are left alone; "" where it cannot be
    read."""
    try:
        return wire.decode_scope(data).name
    except MalformedRequest:
        return ""  # its points are refused one by one, if they are usage at all


def why_whole(what: str, data: bytes, refusal_of: Callable[[bytes], Refusal | None]) -> Refusal | None:
    """Why usage beside a resource or scope (`what`) is kept as one and not taken apart, or None. `refusal_of` decodes
    it. (Where one cannot be read, and is small, each of its points is refused.)"""
    if len(data) > MAX_BYTES:
        problem = f"its {what} takes {len(data):,} bytes, at most {MAX_BYTES:,} are taken"
    else:
        try:
            return refusal_of(data)
        except MalformedRequest as error:
            if len(data) <= MAX_UNREADABLE:
                return None
            problem = f"its {what} takes {len(data):,} bytes and cannot be read: {error}"
    return Refusal(Reason.RESOURCE_TOO_LARGE, problem)


def _check(what: str, stored: Attributes, beside: int = 0) -> Refusal | None:
    problem = None
    if len(stored) > MAX_ATTRIBUTES:
        problem = f"{len(stored)} attributes, at most {MAX_ATTRIBUTES} are taken"
    elif (size := beside + len(attributes_json(stored))) > MAX_STORED:
        problem = f"{size:,} characters, at most {MAX_STORED:,} are taken"
    return None if problem is None else Refusal(Reason.RESOURCE_TOO_LARGE, f"its {what} has {problem}")
