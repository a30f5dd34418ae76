"""Errors that the SDK raises, all of them where something is declared or configured, never inside a handler.

    TallymarkError
    ├── DeclarationError (ValueError)   a meter's name, unit, quantity or attributes, or what is decorated, is wrong
    └── SettingsError (ValueError)      configure() cannot work with its arguments and the environment

Once the program runs, metering raises nothing: what cannot be counted is refused with a warning on the logger
`tallymark`, one value at a time.
"""


class TallymarkError(Exception):
    """Base of every error that the SDK raises."""


class DeclarationError(TallymarkError, ValueError):
    """A meter, its quantity or its attributes cannot be used as declared. Raised when the module is imported."""


class SettingsError(TallymarkError, ValueError):
    """`configure()` was given settings that cannot work; the message lists every problem found."""
