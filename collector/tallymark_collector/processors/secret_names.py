"""Which names are credentials': of attributes, of query parameters, and of what is assigned in a text."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CAPTURED: Final = re.compile(r"(?:^|\.)(?:headers?|metadata|trailers?)\.(?P<key>.+)$")
"""`http.request.header.<key>`, `http.response.header.<key>`, `rpc.grpc.request.metadata.<key>` and their like."""
_HEADER_WORDS: Final = _set(
    "authorization authentication cookie cookie2 token jwt secret password passwd passphrase credential credentials"
    " apikey session sessionid signature assertion bearer hmac otp"
)
"""A captured header is a credential if any word of its name is one of these; so is one that ends in `auth` or `key`,"""
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
_ALONE: Final = _set("bearer hmac otp passcode")
"""or if all of it is one of these."""
_ALONE_IN_TEXTS: Final = _ALONE | _set("token session")
"""The same, also behind a dot, where a text assigns it a value. As an attribute's name they may be what somebody counts
by (the sessions of an account, a network's bearer): all of them made one would be another bill."""
_FORMS: Final = _set("value text string raw pem der jwk base64 b64 hex header")
"""What may stand behind a credential's name and says in which form it is."""
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
    " bearer otp totp passcode oauthtoken oauthverifier codeverifier devicecode usercode authcode apisecret"
    " privatetoken"
)
"""Query parameters, in lower case and without `-`, `_` and `.`."""
_CODE: Final = "code"
LEAST_CODE: Final = 6
"""Characters of a query parameter `code` that is taken for one of OAuth's or a one-time password; a shorter one is a
country, or a status."""

_WORDS: Final = re.compile(r"[a-z0-9]+")
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret(name: str) -> bool:
    """True if an attribute of this name is a credential, whatever its value."""
    lower = name.lower()
    if lower in _WHOLE or lower.startswith(_BEGINNINGS):
        return True
    captured = _CAPTURED.search(lower)
    if captured is not None:
        words = _WORDS.findall(captured["key"])
        last = words[-1] if words else ""
        is_key = last.endswith("key") and _HARMLESS_KEYS.isdisjoint(words)
        return is_key or last == "auth" or not _HEADER_WORDS.isdisjoint(words)
    return _is_secret(name)


def is_assigned_secret(name: str) -> bool:
    """The same of a name that a text gives a value."""
    return name.lower().rpartition(".")[2] in _ALONE_IN_TEXTS or _is_secret(name)


def _is_secret(name: str) -> bool:
    if name.lower() in _ALONE:
        return True
    words = _WORDS.findall(_HUMP.sub("_", name).lower())
    if words[-3:] == ["access", "key", "id"]:  # half of a pair, as clouds name it
        return True
    form = ""
    while len(words) > 1 and words[-1] in _FORMS:
        form = words.pop()
        if (words[-1], form) in _LAST_PAIRS:
            return True
    if not words:
        return False
    return words[-1] in _LAST_WORDS or tuple(words[-2:]) in _LAST_PAIRS or (form == "header" and words[-1] == "auth")


def is_secret_parameter(name: str, value: str) -> bool:
    """True if a query parameter of this name is a credential; its name may be escaped."""
    plain = "".join(_WORDS.findall(unquote(name).lower()))
    return plain in _PARAMETERS or (plain == _CODE and len(value) >= LEAST_CODE)
