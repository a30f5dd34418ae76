"""One line of an access log in the Common or Combined format, as Apache and nginx write them.

address ident user [time] "request" status bytes                            common
address ident user [time] "request" status bytes "referrer" "user agent"    combined
"""

from __future__ import annotations

import re
from typing import Final

from tallymark_collector.imports.faults import LineFault

COMMON: Final = ("host", "ident", "user", "time", "request", "method", "target", "path", "protocol", "status", "bytes")
COMBINED: Final = (*COMMON, "referrer", "user_agent")
"""The fields of a line. `target` is what was asked for; `path` is that without its query."""

METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
OTHER_METHOD: Final = "_OTHER"
"""What OpenTelemetry calls every other method: clients may send any word."""

_QUOTED: Final = r'"((?:[^"\\]|\\.)*)"'
# Each piece begins with what no piece before can end with, so that a wrong line costs no more than a right one.
_COMMON_PIECES: Final = (
    (r"(\S+)", "the client's address"),
    (r" (\S+)", "the identity (-)"),
    (r' (""|[^\["]+)', "the user"),
    (r" \[([^\]]*)\]", "the time in brackets"),
    (rf" {_QUOTED}", "the request between quotes"),
    (r" (\d{3}|-)", "the status, three digits"),
    (r" (\d+|-)", "the size in bytes, or -"),
)
_COMBINED_PIECES: Final = (
    *_COMMON_PIECES,
    (rf" {_QUOTED}", "the referrer between quotes"),
    (rf" {_QUOTED}", "the user agent between quotes"),
)
_SCHEME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]*")
_ESCAPED: Final = re.compile(r'\\(["\\])')
_COMMON_LINE: Final = re.compile("".join(piece for piece, _ in _COMMON_PIECES) + r"\s*")
_COMBINED_LINE: Final = re.compile("".join(piece for piece, _ in _COMBINED_PIECES) + r"\s*")


def common(text: str) -> dict[str, str]:
    """The fields of a line in the Common format. Raises LineFault."""
    return _fields(text, _COMMON_LINE, _COMMON_PIECES)


def combined(text: str) -> dict[str, str]:
    """The fields of a line in the Combined format. Raises LineFault."""
    return _fields(text, _COMBINED_LINE, _COMBINED_PIECES)


def _fields(text: str, line: re.Pattern[str], pieces: tuple[tuple[str, str], ...]) -> dict[str, str]:
    found = line.fullmatch(text)
    if found is None:
        raise LineFault(_explained(text, pieces))
    host, ident, user, time, request, status, size, *more = found.groups()
    fields = {"host": host, "time": time, "request": _unescaped(request), "bytes": "0" if size == "-" else size}
    fields |= {
        name: value
        for name, value in (("ident", ident), ("user", user.strip()), ("status", status))
        if value not in ("-", '""')
    }
    for name, value in zip(("referrer", "user_agent"), more, strict=False):
        if value != "-":
            fields[name] = _unescaped(value)
    method, _, rest = fields["request"].partition(" ")
    target, _, protocol = rest.rpartition(" ")
    if target and protocol.startswith("HTTP/"):
        fields |= {"method": method, "target": target, "protocol": protocol}
        fields["path"] = path_of(target)
    return fields


def path_of(target: str) -> str:
    """The path in a request's target, without query, fragment and, of an absolute one, scheme and host."""
    if not target.startswith("/"):
        target = _SCHEME.sub("", target, count=1)
    return target.partition("?")[0].partition("#")[0] or "/"


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def _explained(text: str, pieces: tuple[tuple[str, str], ...]) -> str:
    place = 0
    for pattern, name in pieces:
        found = re.compile(pattern).match(text, place)
        if found is None:
            return f"expected {name} at character {place + 1}"
        place = found.end()
        if name == "the user":
            place -= len(found[0]) - len(found[0].rstrip(" "))
    return f"expected the line's end at character {place + 1}"
