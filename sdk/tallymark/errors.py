"""Errors that the SDK raises, all of them where something is declared or configured, never inside a handler.

    TallymarkError
    ├── DeclarationError (ValueError)   a meter's name, unit, quantity or attributes, or what is decorated, is wrong
    └── SettingsError (ValueError)      configure() cannot work with its arguments and the environment

Once the program runs, metering raises nothing: what cannot be counted is refused with a warning on the logger
`tallymark`, one value at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class TallymarkError(Exception):
    """Base of every error that the SDK raises."""


class DeclarationError(TallymarkError, ValueError):
    """A meter, its quantity or its attributes cannot be used as declared. Raised when the module is imported."""


class SettingsError(TallymarkError, ValueError):
    """`configure()` was given settings that cannot work; the message lists every problem found."""


def checked_function(where: str, function: object, otherwise: str = "") -> Callable[[Any], Any]:
    """What is called to look at a call. Raises DeclarationError for what cannot be: no function, or a coroutine
    function or a generator, whose answer nobody would wait for; `otherwise` says what to do in the place of these."""
    if not callable(function):
        raise DeclarationError(f"{where}: a function is needed, not a {type(function).__name__}")
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004 - an object's own is what runs
        if (
            inspect.iscoroutinefunction(called)
            or inspect.isgeneratorfunction(called)
            or inspect.isasyncgenfunction(called)
        ):
            raise DeclarationError(
                f"{where}: the function must give its answer at once: no `async`, no `yield`{otherwise}"
            )
    return function
