"""What clients send and nobody may find stored: credentials, by the names of their attributes and by how they look.

OpenTelemetry's semantic conventions forbid credentials in `url.full`, have the values of some query parameters replaced
by `REDACTED`, and warn of captured headers. Not every instrumentation heeds that, and here attributes are kept for
years: as dimensions, as evidence, in quarantine. So each value that the rule below names is replaced before anything
is stored; the name stays. What identifies a stream is taken from what was sent (`processors.sent`): a retry is a
duplicate, whatever is redacted, and switching this on or off makes no stream another one.

The rule:

- of an attribute that is a credential by its name (`processors.secret_names`), the whole value: captured headers and
  gRPC metadata such as `authorization`, `cookie`, `set-cookie`, `x-api-key`; names that end in `password`, `secret`,
  `api_key`, `access_token` and the like; `db.connection_string`; a process's command line and environment; what
  `--redact` names;
- in every text what is one by how it looks (`processors.secret_texts`): user and password of a URL, query parameters
  and other assignments to names of credentials, `Authorization` and `Bearer`, private keys, tokens of a known form.

An account and what names a service stay as they are, and no name under `tallymark.` is a credential's: what is billed
hangs on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tallymark import conventions
from tallymark_collector.model import Attributes, AttributeValue
from tallymark_collector.processors.secret_names import is_secret
from tallymark_collector.processors.secret_texts import REDACTED, without_secrets

_OWN: Final = "tallymark."
_IDENTIFYING: Final = frozenset(
    {conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME, conventions.SERVICE_INSTANCE, conventions.ACCOUNT}
)


@dataclass(frozen=True, slots=True)
class Redaction:
    """The rule at work."""

    names: tuple[str, ...] = ()
    """Further attributes whose values are not to be stored, in any case; `*` at the end stands for whatever follows."""
    on: bool = True

    def names_secret(self, name: str) -> bool:
        """True if an attribute of this name is a credential, whatever its value."""
        return self.on and _names_secret(self.names, name)

    def value(self, name: str, value: AttributeValue) -> AttributeValue:
        """An attribute's value as it may be stored; the same object where nothing is to be redacted."""
        if not self.on or name in _IDENTIFYING:
            return value
        if value is not None and not isinstance(value, bool) and _names_secret(self.names, name):
            return (REDACTED,) if isinstance(value, tuple) and not isinstance(value, Attributes) else REDACTED
        match value:
            case str():
                return self.text(value)
            case Attributes():
                return self.attributes(value)
            case tuple():
                found = tuple(self.value(name, one) for one in value)
                return value if all(map(_same, found, value)) else found
            case _:
                return value

    def attributes(self, attributes: Attributes) -> Attributes:
        """Attributes as they may be stored; the same object where nothing is to be redacted."""
        if not self.on:
            return attributes
        found = [(name, self.value(name, value)) for name, value in attributes]
        same = all(new is old for (_, new), (_, old) in zip(found, attributes, strict=True))
        return attributes if same else Attributes(found)

    def text(self, text: str) -> str:
        """A text without the credentials that can be known by how they look."""
        return without_secrets(text) if self.on else text


STANDARD: Final = Redaction()
"""What holds where nobody has said otherwise."""


def _same(one: object, other: object) -> bool:
    return one is other


@lru_cache(maxsize=8192)
def _names_secret(further: tuple[str, ...], name: str) -> bool:
    if name.startswith(_OWN) or name in _IDENTIFYING:
        return False
    lower = name.lower()
    for each in further:
        asked = each.lower()
        if lower.startswith(asked[:-1]) if asked.endswith("*") else lower == asked:
            return True
    return is_secret(name)
