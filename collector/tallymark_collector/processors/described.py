"""Resources and scopes: what many points and spans share.

Each stream has a copy in the database, and so has each point or span in quarantine. So none may be large: usage beside
one that is stays whole, as one item of the quarantine, and is not taken apart.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tallymark_collector import wire
from tallymark_collector.model import Attributes, AttributeValue, Reason, Refusal
from tallymark_collector.processors.redaction import Redaction
from tallymark_collector.processors.sent import identifying

MAX_BYTES: Final = 256 * 1024
"""Of an encoded resource, and of a scope, as it came: some have a process's whole command line."""
MAX_STORED: Final = 32 * 1024
"""Characters of what is stored of either, less what is redacted (a command line is). Those of a container in a cluster,
with its labels, take two or three thousand."""
MAX_ATTRIBUTES: Final = 256
"""Of either."""


class Described(NamedTuple):
    """A resource and a scope, decoded."""

    resource: Attributes
    sender: Attributes
    """Those of the resource's attributes that say which process it is."""
    stored: Attributes
    """The resource's attributes as they may be stored; the same object where nothing is redacted."""
    scope_name: str
    scope_version: str
    scope_attributes: Attributes
    refusal: Refusal | None
    """Why usage beside them is kept as one, if they are too large."""


def described(resource: bytes, scope: bytes, redaction: Redaction) -> Described:
    """Decodes both. Raises MalformedRequest."""
    attributes = wire.decode_resource(resource)
    instrumentation = wire.decode_scope(scope)
    name, version = instrumentation.name, instrumentation.version
    of_scope = wire.decode_attributes(instrumentation.attributes)
    stored = redaction.attributes(attributes)
    refusal = _check("resource", stored) or _check("scope", redaction.attributes(of_scope), len(name) + len(version))
    return Described(attributes, identifying(attributes), stored, name, version, of_scope, refusal)


def too_large(what: str, data: bytes) -> Refusal | None:
    """Why an encoded resource or scope is not even decoded, or None."""
    if len(data) <= MAX_BYTES:
        return None
    return Refusal(Reason.RESOURCE_TOO_LARGE, f"its {what} takes {len(data):,} bytes, at most {MAX_BYTES:,} are taken")


def _check(what: str, stored: Attributes, beside: int = 0) -> Refusal | None:
    problem = None
    if len(stored) > MAX_ATTRIBUTES:
        problem = f"{len(stored)} attributes, at most {MAX_ATTRIBUTES} are taken"
    elif (size := beside + _size(stored)) > MAX_STORED:
        problem = f"{size:,} characters, at most {MAX_STORED:,} are taken"
    return None if problem is None else Refusal(Reason.RESOURCE_TOO_LARGE, f"its {what} has {problem}")


def _size(value: AttributeValue) -> int:
    match value:
        case Attributes():
            return sum(len(name) + _size(inner) for name, inner in value)
        case tuple():
            return sum(map(_size, value))
        case str() | bytes():
            return len(value)
        case _:
            return 8
