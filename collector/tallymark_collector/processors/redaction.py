"""What clients send and nobody may find stored: credentials, by the names of their attributes and by how they look.

OpenTelemetry's semantic conventions forbid credentials in `url.full`, have the values of some query parameters replaced
by `REDACTED`, and warn of captured headers. Not every instrumentation heeds that, and here attributes are kept for
years: as dimensions, as evidence, in quarantine. So each value that the rule below names is replaced before anything
is stored; the name stays. What identifies a stream is taken from what was sent (`processors.sent`): a retry is a
duplicate, whatever is redacted, and switching this on or off makes no stream another one.

The rule:

- of an attribute that is a credential by its name, the whole value: captured headers and gRPC metadata such as
  `authorization`, `cookie`, `set-cookie`, `x-api-key`; names that end in `password`, `secret`, `api_key`,
  `access_token` and the like; `db.connection_string`; a process's command line and environment; what `--redact` names;
- in every text, user and password of a URL, the values of query parameters that are credentials by their names, and
  Tallymark's own tokens.

An account and what names a service stay as they are, and no name under `tallymark.` is a credential's: what is billed
hangs on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from tallymark import conventions
from tallymark_collector.model import Attributes, AttributeValue

REDACTED: Final = "REDACTED"
"""What stands in the place of a value, as in OpenTelemetry's conventions."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_OWN: Final = "tallymark."
_IDENTIFYING: Final = frozenset(
    {conventions.SERVICE_NAMESPACE, conventions.SERVICE_NAME, conventions.SERVICE_INSTANCE, conventions.ACCOUNT}
)

_CAPTURED: Final = re.compile(r"(?:^|\.)(?:headers?|metadata|trailers?)\.(?P<key>.+)$")
"""`http.request.header.<key>`, `http.response.header.<key>`, `rpc.grpc.request.metadata.<key>` and their like."""
_HEADER_WORDS: Final = _set(
    "authorization authentication cookie cookie2 token jwt secret password passwd passphrase credential credentials"
    " apikey session sessionid signature assertion"
)
"""A captured header is a credential if any word of its name is one of these; so is one that ends in `key`,"""
_HARMLESS_KEYS: Final = frozenset({"idempotency", "cache", "surrogate", "websocket", "partition", "routing"})
"""but for keys of these kinds."""
_LAST_WORDS: Final = _set(
    "authorization cookie password passwd pwd passphrase secret credential credentials apikey jwt"
)
"""Any attribute is a credential if its name ends in one of these words,"""
_LAST_PAIRS: Final = frozenset(
    (first, second)
    for second, several in {
        "key": "api access private secret subscription signing encryption account",
        "token": "access refresh id auth bearer session security api csrf xsrf",
        "cookie": "set",
        "string": "connection",
    }.items()
    for first in several.split()
)
"""or in two words such as these."""
_WHOLE: Final = frozenset({"db.connection_string", "process.command_line", "process.command_args"})
_BEGINNINGS: Final = ("process.environment_variable.",)

_PARAMETERS: Final = _set(
    # OpenTelemetry's list,
    "awsaccesskeyid signature sig xgoogsignature"
    # and what else clouds and services have credentials in.
    " xamzsignature xamzcredential xamzsecuritytoken xgoogcredential xmssignature googleaccessid hmac"
    " key apikey xapikey accesskey accesskeyid secretkey privatekey subscriptionkey"
    " token accesstoken refreshtoken idtoken authtoken bearertoken sessiontoken securitytoken csrftoken apitoken jwt"
    " auth authorization password passwd pwd passphrase secret clientsecret credential credentials assertion"
    " clientassertion samlresponse session sessionid sid jsessionid phpsessid"
)
"""Query parameters, in lower case and without `-`, `_` and `.`."""

_WORDS: Final = re.compile(r"[a-z0-9]+")
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_USER_INFO: Final = re.compile(r"//(?P<user>[^\s/?#:]*)(?P<password>:[^\s/?#]*)?@(?=[^\s/?#@]*(?:[\s/?#]|$))")
_PARAMETER: Final = re.compile(r"(?P<before>[?&#;]|^)(?P<name>[^=&#?;\s/]{1,64})=(?P<value>[^&#;\s\"'<>]+)")
_TOKEN: Final = re.compile(r"(?P<name>tmk_[0-9a-z]{1,12}_)\w+", re.ASCII)
_SUSPECT: Final = re.compile(r"//[^\s/?#]*@|=|tmk_")
"""What a text has that any of the three may find something in; most have not."""


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
        if not self.on or not _SUSPECT.search(text):
            return text
        found = _USER_INFO.sub(_without_user, text)
        found = _TOKEN.sub(rf"\g<name>{REDACTED}", found)
        found = without_parameters(found)
        return text if found == text else found


STANDARD: Final = Redaction()
"""What holds where nobody has said otherwise."""


def without_parameters(text: str) -> str:
    """A text without the values of query parameters that are credentials."""
    return _PARAMETER.sub(_without_value, text)


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
    if lower in _WHOLE or lower.startswith(_BEGINNINGS):
        return True
    captured = _CAPTURED.search(lower)
    if captured is not None:
        words = _WORDS.findall(captured["key"])
        is_key = bool(words) and words[-1].endswith("key") and _HARMLESS_KEYS.isdisjoint(words)
        return is_key or not _HEADER_WORDS.isdisjoint(words)
    words = _WORDS.findall(_HUMP.sub("_", name).lower())
    return bool(words) and (words[-1] in _LAST_WORDS or tuple(words[-2:]) in _LAST_PAIRS)


def _without_user(found: re.Match[str]) -> str:
    if not found["user"] and not found["password"]:
        return found[0]
    return f"//{REDACTED}@" if found["password"] is None else f"//{REDACTED}:{REDACTED}@"


def _without_value(found: re.Match[str]) -> str:
    name = "".join(_WORDS.findall(unquote(found["name"]).lower()))
    return f"{found['before']}{found['name']}={REDACTED}" if name in _PARAMETERS else found[0]
