"""Settings: arguments of `configure()` over TALLYMARK_* over OpenTelemetry's own variables.

OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS, _CERTIFICATE, _COMPRESSION and their _METRICS_ forms are read by
`tallymark.endpoint` where they are not given here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from tallymark.dimensions import is_text
from tallymark.errors import SettingsError

DEFAULT_INTERVAL_S: Final = 10.0
DEFAULT_SHUTDOWN_S: Final = 10.0
MAX_SECONDS: Final = 86_400.0

_HEADER: Final = re.compile(r"[0-9a-z_.\-]+")
_COMPRESSIONS: Final = ("none", "gzip", "deflate")


@dataclass(frozen=True)
class Settings:
    """How this process sends usage. Times in seconds; None leaves a choice to OpenTelemetry's variables.

    `state_dir` None is `default_state_dir`."""

    endpoint: str | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # they hold credentials
    insecure: bool | None = None
    timeout_s: float | None = None
    interval_s: float = DEFAULT_INTERVAL_S
    shutdown_timeout_s: float = DEFAULT_SHUTDOWN_S
    resource: tuple[tuple[str, str], ...] = ()
    disabled: bool = False
    state_dir: str | None = None


def default_state_dir(environ: Mapping[str, str] = os.environ) -> str:
    """`$XDG_STATE_HOME/tallymark`, else `~/.local/state/tallymark`."""
    given = environ.get("XDG_STATE_HOME", "")
    return os.path.join(given if os.path.isabs(given) else os.path.expanduser("~/.local/state"), "tallymark")  # noqa: PTH117, PTH118, PTH111


def disabled_by(environ: Mapping[str, str] = os.environ) -> bool:
    """TALLYMARK_DISABLED, for usage recorded before `configure()`; a value that is no truth does not disable."""
    return environ.get("TALLYMARK_DISABLED", "").strip().lower() in ("true", "1")


def make_settings(
    *,
    endpoint: str | None = None,
    headers: Mapping[str, str] | None = None,
    insecure: bool | None = None,
    timeout: float | None = None,
    interval: float | None = None,
    shutdown_timeout: float | None = None,
    resource: Mapping[str, str] | None = None,
    disabled: bool | None = None,
    state_dir: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings in force. Raises SettingsError with every problem that there is, not only the first."""
    reader = _Reader(environ)
    settings = Settings(
        endpoint=reader.endpoint(endpoint),
        headers=reader.headers(headers),
        insecure=reader.truth("insecure", insecure, "TALLYMARK_INSECURE"),
        timeout_s=reader.seconds("timeout", timeout, "TALLYMARK_TIMEOUT"),
        interval_s=reader.interval(interval),
        shutdown_timeout_s=reader.seconds("shutdown_timeout", shutdown_timeout, "TALLYMARK_SHUTDOWN_TIMEOUT")
        or DEFAULT_SHUTDOWN_S,
        resource=reader.resource(resource),
        disabled=bool(reader.truth("disabled", disabled, "TALLYMARK_DISABLED")),
        state_dir=reader.folder("state_dir", state_dir, "TALLYMARK_STATE_DIR"),
    )
    reader.check_exporter_variables()
    if reader.problems:
        raise SettingsError("tallymark cannot be configured:\n" + "\n".join(f"  - {p}" for p in reader.problems))
    return settings


class _Reader:
    """Reads one setting after the other and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def _variable(self, name: str) -> str | None:
        # An empty variable counts as unset, as OpenTelemetry has it.
        return self._environ.get(name, "").strip() or None

    def _problem(self, where: str, value: object, want: str) -> None:
        self.problems.append(f"{where}={value!r}: {want}")

    def endpoint(self, given: object) -> str | None:
        where, value = (
            ("TALLYMARK_ENDPOINT", self._variable("TALLYMARK_ENDPOINT")) if given is None else ("endpoint", given)
        )
        if value is None:
            return None
        want = "must be http://host:port, https://host:port or host:port (which means TLS unless insecure=True)"
        if not isinstance(value, str) or not value or not is_text(value) or any(c.isspace() for c in value):
            self._problem(where, value, want)
            return None
        if "://" in value:
            try:
                parts = urlsplit(value)
                fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                fits = False
            if not fits:
                self._problem(where, value, want)
        return value

    def headers(self, given: object) -> tuple[tuple[str, str], ...]:
        """Values are never put into a message: they are credentials."""
        pairs: list[tuple[object, object]] = []
        where = "headers"
        if given is None:
            where = "TALLYMARK_HEADERS"
            for item in filter(None, (i.strip() for i in (self._variable(where) or "").split(","))):
                name, found, value = item.partition("=")
                if not found:
                    self.problems.append(f"{where}: must be name=value,name=value")
                    continue
                pairs.append((name.strip(), unquote(value.strip())))
        elif isinstance(given, Mapping):
            pairs = list(given.items())
        else:
            self.problems.append(f"{where}: must be a mapping of name to value")
        headers: dict[str, str] = {}
        for header, text in pairs:
            if not isinstance(header, str) or not _HEADER.fullmatch(header.lower()):
                self._problem(where, header, "a name may hold only a-z 0-9 _ . -")
            elif not isinstance(text, str) or not text.isascii() or not text.isprintable():
                self.problems.append(f"{where}: the value of {header!r} must be printable ASCII")
            else:
                headers[header.lower()] = text
        return tuple(sorted(headers.items()))

    def folder(self, where: str, given: object, variable: str) -> str | None:
        value = given if given is not None else self._variable(variable)
        if value is None:
            return None
        if not isinstance(value, (str, os.PathLike)) or not is_text(path := os.fspath(value)) or not path:
            self._problem(where if given is not None else variable, value, "must be a folder's path")
            return None
        return os.path.abspath(path)  # noqa: PTH100 - a path as it is told, not resolved

    def truth(self, where: str, given: object, variable: str) -> bool | None:
        if given is not None:
            if not isinstance(given, bool):
                self._problem(where, given, "must be True or False")
            return bool(given)
        text = self._variable(variable)
        if text is None:
            return None
        if text.lower() not in ("true", "false", "1", "0"):
            self._problem(variable, text, "must be true or false")
        return text.lower() in ("true", "1")

    def seconds(self, where: str, given: float | None, variable: str, scale: float = 1.0) -> float | None:
        value: object = given
        if given is None:
            where, value = variable, self._variable(variable)
            if value is None:
                return None
        try:
            number = float(value) * scale if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number <= MAX_SECONDS:
            unit = "milliseconds" if scale != 1.0 else "seconds"
            self._problem(where, value, f"must be a number of {unit}, above 0 and at most a day")
            return None
        return number

    def interval(self, given: float | None) -> float:
        interval = self.seconds("interval", given, "TALLYMARK_EXPORT_INTERVAL")
        if interval is None and given is None and self._variable("TALLYMARK_EXPORT_INTERVAL") is None:
            interval = self.seconds("", None, "OTEL_METRIC_EXPORT_INTERVAL", scale=0.001)
        return DEFAULT_INTERVAL_S if interval is None else interval

    def resource(self, given: object) -> tuple[tuple[str, str], ...]:
        if given is None:
            return ()
        if not isinstance(given, Mapping):
            self.problems.append("resource: must be a mapping of attribute to text")
            return ()
        for name, value in given.items():
            if not is_text(name) or not name or not is_text(value) or not value:
                self._problem("resource", name, "names and values must be texts that are not empty")
        return tuple(sorted((str(name), str(value)) for name, value in given.items()))

    def check_exporter_variables(self) -> None:
        """The exporter reads these when the first usage is sent, too late to tell anybody."""
        for variable in ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT"):
            self.seconds("", None, variable)
        for variable in ("OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION"):
            text = self._variable(variable)
            if text is not None and text.lower() not in _COMPRESSIONS:
                self._problem(variable, text, f"must be one of {', '.join(_COMPRESSIONS)}")
