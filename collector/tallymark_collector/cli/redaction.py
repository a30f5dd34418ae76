"""Passwords and tokens stay out of everything that is printed."""

from __future__ import annotations

import re
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.access.tokens import ID_LENGTH, PREFIX
from tallymark_collector.processors.secret_texts import without_parameters
from tallymark_collector.store.engines import libpq_string

HIDDEN: Final = "***"

_SHOWN: Final = ("host", "hostaddr", "port", "user", "dbname", "service")
"""What names a database. Of a connection string nothing else is shown, whatever libpq may learn to take."""

_KEY: Final = r"(?:[a-z_]*password|[a-z_]*secret)"
_RULES: Final = (
    # scheme://user:password@host, where the password may hold what ought to have been escaped
    (re.compile(r"(://[^\s:@/?]*):\S*@"), rf"\1:{HIDDEN}@"),
    # …?password=…&…
    (re.compile(rf"([?&]{_KEY}=)[^\s&]*", re.IGNORECASE), rf"\1{HIDDEN}"),
    # password=… and password = '…', with libpq's escapes
    (
        re.compile(rf"(?<![?&\w])({_KEY}\s*=\s*)(?:'(?:[^'\\]|\\.)*'|(?:\\.|[^\s\\])+)", re.IGNORECASE | re.DOTALL),
        rf"\1{HIDDEN}",
    ),
    # a token: its public name stays. Also one that was cut off, or has a slip in it.
    (re.compile(rf"({PREFIX}_[0-9a-z]{{1,{ID_LENGTH}}}_)\w+", re.ASCII), rf"\1{HIDDEN}"),
    # whatever else was sent as a credential
    (re.compile(r"(\b(?:bearer|basic)\s+)[^\s'\",;)]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text with the passwords of connection strings in it hidden, in both forms that libpq reads, tokens, and what
    is a credential in a URL's query."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return without_parameters(text)


def shown(database: str) -> str:
    """What names a database, for people and logs: where it is and as whom, never a secret."""
    if database.startswith("embedded:"):
        return database
    try:
        parts = conninfo_to_dict(libpq_string(database))
    except psycopg.Error:
        return "(a connection string that cannot be read)"
    # An @ inside a host means that libpq took a piece of the password for the host.
    known = {name: str(parts[name]) for name in _SHOWN if parts.get(name)}
    return make_conninfo("", **{name: text for name, text in known.items() if "@" not in text[1:]}) or "(defaults)"


def misread(database: str) -> bool:
    """True if an address has an @ or / in its password that is not escaped: libpq would look for a piece of the
    password as a host, and say so."""
    _, scheme, address = database.partition("://")
    authority, _, path = address.partition("/")
    return bool(scheme) and (authority.count("@") > 1 or "@" in path.partition("?")[0])
