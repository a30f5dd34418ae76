"""Whom requests are for and what they are counted by, where the environment says it and not the code.

    TALLYMARK_IDENTIFY=shop.usage:whose      a function of the ASGI scope, WSGI environ, Django request, gRPC context
    TALLYMARK_TRACK=requests,api.calls       meters that count every request, in {request}

Nothing is imported or declared before the first request, so that the service's modules may import the framework, and
what they declare themselves comes first.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from tallymark import runtime
from tallymark.decorators import UsageTracker, track_usage
from tallymark.errors import DeclarationError, SettingsError, checked_function
from tallymark.identity import current_identity
from tallymark.integrations.serving import ASYNC_WAY, Found, Resolver
from tallymark.meters import REQUEST_UNIT, Meter
from tallymark.reporting import logger

IDENTIFY: Final = "TALLYMARK_IDENTIFY"
TRACK: Final = "TALLYMARK_TRACK"

_PLACE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class RequestVariables:
    """What the two variables say."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        place = environ.get(IDENTIFY, "").strip()
        self.resolver: Resolver[Any] | None = NamedResolver(place) if place else None
        names = (name.strip() for name in environ.get(TRACK, "").split(","))
        self._names = tuple(dict.fromkeys(filter(None, names)))

    def problems(self) -> list[str]:
        """What is wrong with the variables by themselves, a sentence each."""
        found = []
        if isinstance(self.resolver, NamedResolver) and not _PLACE.fullmatch(self.resolver.place):
            found.append(_wanted(self.resolver.place))
        for name in self._names:
            try:
                Meter(name, REQUEST_UNIT)
            except DeclarationError as error:
                found.append(f"{TRACK}: {error}")
        return found

    def expect(self) -> None:
        """Tells of the meters before anything is counted."""
        for name in self._names:
            runtime.current().meters.expect(name)

    def trackers(self) -> list[UsageTracker]:
        """One of each meter that can be declared; an error in the log for any other."""
        trackers = []
        for name in self._names:
            try:
                trackers.append(track_usage(name))
            except DeclarationError as error:
                runtime.current().reporter.error(
                    f"{TRACK} {name}", "%s: requests are not counted by this meter: %s", TRACK, error
                )
        return trackers


class NamedResolver:
    """A resolver by its name. It is asked for nobody whom the code has identified already."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._function: Callable[[Any], Found] | None = None
        self._error: SettingsError | None = None

    def __call__(self, about: Any) -> Found:
        """Raises SettingsError, each time, when the function cannot be imported; the reason is in the log once."""
        if current_identity().account is not None:
            return None
        if self._function is None:
            if self._error is None:
                self._load()
            if self._function is None:
                raise SettingsError(str(self._error))
        return self._function(about)

    def _load(self) -> None:
        """Threads may both do it, with one outcome: a lock could be held by a thread that a forked child lacks."""
        try:
            self._function = _imported(self.place)
        except (Exception, SystemExit) as error:
            # A module's body may do anything, ending the process included.
            told = error if isinstance(error, (SettingsError, DeclarationError)) else None
            self._error = SettingsError(
                str(told) if told else f"{IDENTIFY}={self.place!r}: cannot be imported: {type(error).__name__}: {error}"
            )
            logger.error(
                "%s; requests go on, and their usage is recorded without an account until the variable is right and "
                "the service is started again",
                self._error,
                exc_info=None if told else error,
            )


def _imported(place: str) -> Callable[[Any], Found]:
    """Raises SettingsError and DeclarationError, and whatever the module's import raises."""
    if not _PLACE.fullmatch(place):
        raise SettingsError(_wanted(place))
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return cast(Callable[[Any], Found], checked_function(f"{IDENTIFY}={place!r}", found, ASYNC_WAY))


def _wanted(place: str) -> str:
    return f"{IDENTIFY}={place!r}: must be package.module:function"
