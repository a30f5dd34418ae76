"""Reading settings one after the other, and keeping what is wrong with each: `Reader`.

A problem names the argument or the variable that it came from. Values of headers, and addresses that hold a password,
are never put into one: they are credentials.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from tallymark.dimensions import is_text

MAX_SECONDS: Final = 86_400.0

GRPC_SCHEMES: Final = ("dns", "ipv4", "ipv6", "unix", "unix-abstract")
"""Names of gRPC's own for an address, as in unix:/run/collector.sock (gRPC's naming document)."""

Headers = tuple[tuple[str, str], ...]

_HEADER: Final = re.compile(r"[0-9a-z_.\-]+")


class Reader:
    """What an environment says, and `problems`, a sentence for each thing that is wrong with it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def variable(self, name: str) -> str | None:
        """A variable's text. An empty one counts as unset, as OpenTelemetry has it."""
        return self._environ.get(name, "").strip() or None

    def first(self, *names: str) -> tuple[str, str | None]:
        """The first of some variables that is set, with its name; (the last one's name, None) where none is."""
        for name in names:
            text = self.variable(name)
            if text is not None:
                return name, text
        return names[-1], None

    def problem(self, where: str, value: object, want: str) -> None:
        """Keep a problem that shows the value."""
        self.problems.append(f"{where}={value!r}: {want}")

    def truth(self, where: str, given: object, variable: str) -> bool | None:
        """An argument, else a variable, that is true or false."""
        if given is not None:
            if not isinstance(given, bool):
                self.problem(where, given, "must be True or False")
            return bool(given)
        text = self.variable(variable)
        if text is None:
            return None
        if text.lower() not in ("true", "false", "1", "0"):
            self.problem(variable, text, "must be true or false")
        return text.lower() in ("true", "1")

    def choice(self, where: str, given: object, variable: str, words: tuple[str, ...]) -> bool | str | None:
        """An argument, else a variable, that is true, false or one of some words."""
        want = f"must be True, False or {' or '.join(repr(word) for word in words)}"
        if given is not None:
            if isinstance(given, bool) or (isinstance(given, str) and given in words):
                return given
            self.problem(where, given, want)
            return None
        text = self.variable(variable)
        if text is not None and text.lower() in words:
            return text.lower()
        if text is not None and text.lower() not in ("true", "false", "1", "0"):
            self.problem(variable, text, f"must be true, false or {' or '.join(words)}")
            return None
        return None if text is None else text.lower() in ("true", "1")

    def seconds(
        self,
        where: str,
        given: object,
        variable: str | None = None,
        *,
        scale: float = 1.0,
        at_most: float = MAX_SECONDS,
        why: str = "",
    ) -> float | None:
        """An argument, else a variable, in units of `scale` seconds."""
        value = given
        if given is None and variable is not None:
            where, value = variable, self.variable(variable)
        if value is None:
            return None
        try:
            number = float(value) * scale if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number <= at_most:
            unit = "milliseconds" if scale != 1.0 else "seconds"
            self.problem(where, value, f"must be a number of {unit}, above 0 and at most {at_most / scale:.0f}{why}")
            return None
        return number

    def address(self, where: str, value: object) -> str | None:
        """A collector's address: a URL, host:port, or one of gRPC's own names."""
        want = "must be http://host:port, https://host:port or host:port (which means TLS unless insecure=True)"
        if not isinstance(value, str) or not value or not is_text(value) or any(c.isspace() for c in value):
            self.problem(where, value, want)
            return None
        scheme, _, rest = value.partition(":")
        if scheme in GRPC_SCHEMES:
            if rest.strip("/"):
                return value
            self.problem(where, value, want)
            return None
        try:
            parts = urlsplit(value if "://" in value else f"//{value}")
            fits = parts.scheme in ("http", "https", "") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            self.problems.append(f"{where}: {want}") if "@" in value else self.problem(where, value, want)
            return None
        if parts.username is not None:
            self.problems.append(f"{where}: holds a user or a password; send credentials by headers")
        elif not fits:
            self.problem(where, value, want)
        elif parts.path not in ("", "/") or parts.query or parts.fragment:
            self.problem(where, value, "names a path, as OTLP over HTTP has it; usage goes over gRPC: " + want)
        else:
            return value
        return None

    def headers(self, where: str, pairs: Iterable[tuple[object, object]]) -> Headers:
        """Headers that gRPC takes, ordered; a name given twice has its last value."""
        headers: dict[str, str] = {}
        for header, text in pairs:
            name = header.lower() if isinstance(header, str) else ""
            if not _HEADER.fullmatch(name):
                self.problem(where, header, "a name may hold only a-z 0-9 _ . -")
            elif name.startswith("grpc-") or name.endswith("-bin"):
                self.problem(where, header, "names that begin with grpc- or end in -bin are gRPC's own")
            elif not isinstance(text, str) or not text.isascii() or not text.isprintable():
                self.problems.append(f"{where}: the value of {name!r} must be printable ASCII")
            else:
                headers[name] = text
        return tuple(sorted(headers.items()))

    def pairs(self, where: str, text: str) -> list[tuple[str, str]]:
        """name=value,name=value with percent-encoded values, which OpenTelemetry took from W3C Baggage. A value may
        hold more equals signs."""
        pairs = []
        for item in filter(None, (item.strip() for item in text.split(","))):
            name, found, value = item.partition("=")
            if not found or not name.strip():
                self.problems.append(f"{where}: must be name=value,name=value")
            else:
                pairs.append((unquote(name.strip()), unquote(value.strip())))
        return pairs
