"""Credentials in a text that are known by how they look.

Each pattern goes through a text once, whatever stands in it: where one can begin is told by what stands before, what
may be long ends where it ends and needs nothing behind it, and everything else has a length. And what is put in the
place of a credential is found again as it is, or looked at until it is: a text that is redacted twice is the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Final, TypeAlias

from tallymark_collector.processors.secret_names import is_assigned_secret, is_secret_parameter

REDACTED: Final = "REDACTED"
"""What stands in the place of a value, as in OpenTelemetry's conventions."""

_Found: TypeAlias = "re.Match[str]"

_USER_INFO: Final = re.compile(r"//(?P<user>[^\s/?#:]*)(?P<password>:[^\s/?#]*)?@(?=[^\s/?#@]*(?:[\s/?#]|$))")
_PARAMETER: Final = re.compile(r"(?P<before>[?&#;]|^)(?P<name>[^=&#?;\s/]{1,64})=(?P<value>[^&#;\s\"'<>]+)")
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END [A-Z0-9 ]{0,60}-----|\Z)", re.DOTALL
)
_KNOWN: Final = re.compile(
    r"(?<![A-Za-z0-9])(?P<name>tmk_[0-9a-z]{1,12}_(?=\w)|[spr]k_(?:live|test)_(?=\w{8})|whsec_(?=\w{8})|gh[pousr]_(?=\w{20})"
    r"|github_pat_(?=\w{20})|glpat-(?=[\w-]{16})|sk-(?:proj-|ant-[a-z0-9]{1,8}-)?(?=[A-Za-z0-9]{20})|xox[abeprs]-(?=[\w-]{10})|AIza(?=[\w-]{30}))[\w-]+"
    r"|(?<![A-Za-z0-9])(?P<key>AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",
    re.ASCII,
)
"""Tokens of ours, and of others who let theirs begin in one way: Stripe, GitHub, GitLab, OpenAI, Slack, Google, AWS."""
_JWT: Final = re.compile(r"(?<![\w-])eyJ[\w-]{5,}(?:\.[\w-]{5,}){1,4}(?:\.(?![\w-]))?", re.ASCII)
"""Two parts to five: the first is JSON in base64."""
_AUTHORIZATION: Final = re.compile(
    r"(?<![A-Za-z0-9])(?P<before>authorization\\{0,3}[\"']?\s{0,4}[:=](?P<apart>\s{0,4}\\{0,3}[\"']?))"
    r"(?P<schemes>(?:(?:bearer|basic|digest|token|negotiate|apikey|dpop|hmac)\s{1,4}){0,3})"
    r"(?P<value>[^\s\"'\\<>,;&]+)",
    re.IGNORECASE,
)
_SCHEME: Final = re.compile(
    r"(?<![A-Za-z0-9])(?P<before>(?:(?P<basic>basic)|bearer)\s{1,4})(?P<value>[A-Za-z0-9._~+/=-]{4,})", re.IGNORECASE
)
_LONG: Final = 16
"""Characters behind `Bearer` that are no word of a sentence, whatever they are; shorter ones have a digit."""
_IN_JSON: Final = re.compile(
    r"(?P<before>\"(?P<name>[\w.-]{1,64})\"\s{0,8}:\s{0,8}\")(?P<value>[^\"\\]*(?:\\.[^\"\\]*)*)", re.DOTALL
)
_IN_JSON_IN_JSON: Final = re.compile(
    r"(?P<before>(?<!\\)\\{1,7}\"(?P<name>[\w.-]{1,64})\\{1,7}\"\s{0,8}:\s{0,8}\\{1,7}\")(?P<value>[^\"\\]+)"
)
_ASSIGNED: Final = re.compile(
    r"(?<![^\s,({\[|\"'])(?P<before>(?P<name>[A-Za-z][\w.-]{0,63})=)"
    r"(?P<value>\"[^\"]*|'[^']*|[^\s\"'<>&;]+)"
)


_ROUNDS: Final = 4
"""Credentials that stand within one another can need more than one, and none that anybody has seen more than two."""


def without_secrets(text: str) -> str:
    """A text without the credentials that can be known; the same object where there are none."""
    found = text
    for _ in range(_ROUNDS):
        before, found = found, _once(found)
        if found == before:
            break
    return text if found == text else found


def _once(text: str) -> str:
    lower = text.lower()
    for marks, pattern, instead in _RULES:
        for mark in marks:
            if mark in lower:
                text = pattern.sub(instead, text)
                break
    return text


def without_parameters(text: str) -> str:
    """A text without the values of query parameters that are credentials."""
    return _PARAMETER.sub(_parameter, text)


def _user_info(found: _Found) -> str:
    if not found["user"] and not found["password"]:
        return found[0]
    return f"//{REDACTED}@" if found["password"] is None else f"//{REDACTED}:{REDACTED}@"


def _parameter(found: _Found) -> str:
    secret = is_secret_parameter(found["name"], found["value"])
    return f"{found['before']}{found['name']}={REDACTED}" if secret else found[0]


def _authorization(found: _Found) -> str:
    """A header has a blank, a quote or a scheme before its value; `authorization:read` is a permission."""
    value = found["value"]
    is_header = found["apart"] or found["schemes"] or len(value) >= _LONG or any(map(str.isdigit, value))
    return f"{found['before']}{REDACTED}" if is_header else found[0]


def _scheme(found: _Found) -> str:
    value = found["value"]
    if found["basic"] is not None:
        return f"{found['before']}{REDACTED}" if _is_pair(value) else found[0]
    secret = len(value) >= _LONG or any(map(str.isdigit, value))
    return f"{found['before']}{REDACTED}" if secret else found[0]


def _is_pair(value: str) -> bool:
    """True for a user and password as HTTP writes them; a plan may be called "Basic Enterprise"."""
    try:
        return b":" in base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except ValueError:
        return False


def _assigned(found: _Found) -> str:
    if not is_assigned_secret(found["name"]):
        return found[0]
    quote = found["value"][0] if found["value"][:1] in ("'", '"') else ""
    return f"{found['before']}{quote}{REDACTED}"


def _in_json(found: _Found) -> str:
    return f"{found['before']}{REDACTED}" if found["value"] and is_assigned_secret(found["name"]) else found[0]


_BEGINNINGS: Final = (
    *("tmk_", "k_live_", "k_test_", "whsec_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-"),
    *("xox", "aiza", "akia", "asia"),
)
_RULES: Final[tuple[tuple[tuple[str, ...], re.Pattern[str], str | Callable[[_Found], str]], ...]] = (
    (("private key",), _PRIVATE_KEY, rf"-----BEGIN \g<kind>-----{REDACTED}-----END PRIVATE KEY-----"),
    (("@",), _USER_INFO, _user_info),
    (_BEGINNINGS, _KNOWN, rf"\g<name>\g<key>{REDACTED}"),
    (("eyj",), _JWT, REDACTED),
    (("authorization",), _AUTHORIZATION, _authorization),
    (("bearer", "basic"), _SCHEME, _scheme),
    (('"',), _IN_JSON, _in_json),
    (('\\"',), _IN_JSON_IN_JSON, _in_json),
    (("=",), _ASSIGNED, _assigned),
    (("=",), _PARAMETER, _parameter),
)
"""In this order. Before the pattern what a text has in it, in any case, that the pattern may find something in: most
texts have none, and to look for that is many times as fast."""
