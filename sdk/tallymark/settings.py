"""Settings: arguments of `configure()` over TALLYMARK_* over OpenTelemetry's own variables.

All of them are read here, so that one error tells everything that is wrong, whichever source it came from.
`tallymark.otlp_variables` says which of OpenTelemetry's are honoured, and where they are not followed to the letter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from tallymark.dimensions import is_text
from tallymark.errors import SettingsError
from tallymark.otlp_variables import check_otlp_variables
from tallymark.variables import Headers, Reader

DEFAULT_INTERVAL_S: Final = 10.0
DEFAULT_SHUTDOWN_S: Final = 10.0

Baggage = bool | Literal["send", "accept"]
MirrorSetting = bool | Literal["accounts"]


@dataclass(frozen=True)
class Settings:
    """How this process sends usage. Times in seconds; None leaves a choice to OpenTelemetry's variables.

    `state_dir` None is `default_state_dir`."""

    endpoint: str | None = None
    headers: Headers | None = field(default=None, repr=False)  # they hold credentials
    insecure: bool | None = None
    timeout_s: float | None = None
    interval_s: float = DEFAULT_INTERVAL_S
    shutdown_timeout_s: float = DEFAULT_SHUTDOWN_S
    resource: tuple[tuple[str, str], ...] = ()
    disabled: bool = False
    state_dir: str | None = None
    sends_baggage: bool = False
    accepts_baggage: bool = False
    mirrors: bool = False
    mirrors_accounts: bool = False


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
    baggage: Baggage | None = None,
    mirror: MirrorSetting | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings in force. Raises SettingsError with every problem that there is, not only the first."""
    reader = _SettingsReader(environ)
    carried = reader.choice("baggage", baggage, "TALLYMARK_BAGGAGE", ("send", "accept"))
    mirrored = reader.choice("mirror", mirror, "TALLYMARK_MIRROR", ("accounts",))
    settings = Settings(
        endpoint=reader.endpoint(endpoint),
        headers=reader.given_headers(headers),
        insecure=reader.truth("insecure", insecure, "TALLYMARK_INSECURE"),
        timeout_s=reader.seconds("timeout", timeout, "TALLYMARK_TIMEOUT"),
        interval_s=reader.interval(interval),
        shutdown_timeout_s=reader.seconds("shutdown_timeout", shutdown_timeout, "TALLYMARK_SHUTDOWN_TIMEOUT")
        or DEFAULT_SHUTDOWN_S,
        resource=reader.resource(resource),
        disabled=bool(reader.truth("disabled", disabled, "TALLYMARK_DISABLED")),
        state_dir=reader.folder("state_dir", state_dir, "TALLYMARK_STATE_DIR"),
        sends_baggage=carried in (True, "send"),
        accepts_baggage=carried in (True, "accept"),
        mirrors=mirrored in (True, "accounts"),
        mirrors_accounts=mirrored == "accounts",
    )
    if not settings.disabled:  # nothing of it is used then, and switching off must work
        # An endpoint that was given and is wrong is no reason to look at OpenTelemetry's.
        was_given = endpoint is not None or reader.variable("TALLYMARK_ENDPOINT") is not None
        check_otlp_variables(reader, replace(settings, endpoint=settings.endpoint or "") if was_given else settings)
        reader.check_resource_variables()
    if reader.problems:
        raise SettingsError("tallymark cannot be configured:\n" + "\n".join(f"  - {p}" for p in reader.problems))
    return settings


class _SettingsReader(Reader):
    """What only Tallymark's own settings need."""

    def endpoint(self, given: object) -> str | None:
        if given is not None:
            return self.address("endpoint", given)
        text = self.variable("TALLYMARK_ENDPOINT")
        return None if text is None else self.address("TALLYMARK_ENDPOINT", text)

    def given_headers(self, given: object) -> Headers | None:
        if isinstance(given, Mapping):
            return self.headers("headers", given.items())
        if given is not None:
            self.problems.append("headers: must be a mapping of name to value")
            return None
        where = "TALLYMARK_HEADERS"
        text = self.variable(where)
        return None if text is None else self.headers(where, self.pairs(where, text))

    def folder(self, where: str, given: object, variable: str) -> str | None:
        value = given if given is not None else self.variable(variable)
        if value is None:
            return None
        if not isinstance(value, (str, os.PathLike)) or not is_text(path := os.fspath(value)) or not path:
            self.problem(where if given is not None else variable, value, "must be a folder's path")
            return None
        return os.path.abspath(path)  # noqa: PTH100 - a path as it is told, not resolved

    def interval(self, given: float | None) -> float:
        interval = self.seconds("interval", given, "TALLYMARK_EXPORT_INTERVAL")
        if interval is None and given is None and self.variable("TALLYMARK_EXPORT_INTERVAL") is None:
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
                self.problem("resource", name, "names and values must be texts that are not empty")
        return tuple(sorted((str(name), str(value)) for name, value in given.items()))

    def check_resource_variables(self) -> None:
        """OpenTelemetry's detector leaves out what it cannot read, and a service without its name or its id is another
        producer."""
        text = self.variable("OTEL_RESOURCE_ATTRIBUTES")
        where = "OTEL_RESOURCE_ATTRIBUTES"
        for name, value in self.pairs(where, text) if text is not None else ():
            if not is_text(name) or not is_text(value):
                self.problem(where, name, "holds NUL or bytes that are no UTF-8")
        service = self.variable("OTEL_SERVICE_NAME")
        if service is not None and not is_text(service):
            self.problem("OTEL_SERVICE_NAME", service, "holds NUL or bytes that are no UTF-8")
