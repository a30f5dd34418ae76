"""Meters: what an account is billed by, a name and a unit, checked where they are declared."""

import re
import threading
from typing import Final

from tallymark.errors import DeclarationError

# OpenTelemetry's syntax of an instrument's name, so that every backend takes a meter as it is.
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.\-/]{0,254}")

MAX_UNIT_LENGTH: Final = 63
REQUEST_UNIT: Final = "{request}"
PLAIN_UNIT: Final = "1"
MAX_UNDECLARED: Final = 10_000


class Meter:
    """A meter of this process: `name` as on the wire, `unit` in UCUM.

    Compared and hashed by identity: `Meters` makes one object for each name and unit, and a meter is part of the
    key that every recorded call looks up.
    """

    __slots__ = ("name", "unit", "uses")

    def __init__(self, name: str, unit: str) -> None:
        """Raises DeclarationError when the name or the unit is not OpenTelemetry's."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DeclarationError(
                f"meter name {name!r}: must start with a letter and hold at most 255 of A-Z a-z 0-9 _ . - /"
            )
        if not isinstance(unit, str) or not unit or len(unit) > MAX_UNIT_LENGTH or not unit.isascii():
            raise DeclarationError(
                f"meter {name!r}: unit {unit!r} must be 1 to {MAX_UNIT_LENGTH} ASCII characters (UCUM), as in "
                "'{token}', 'By' or '1'"
            )
        if not unit.isprintable():
            raise DeclarationError(f"meter {name!r}: unit {unit!r} holds a character that does not print")
        self.name = name
        self.unit = unit
        self.uses = 0
        """Functions and middlewares that count by it: where it is one, none of its calls can be inside another."""

    def __repr__(self) -> str:
        return f"Meter({self.name!r}, {self.unit!r})"


class Meters:
    """The meters of a process, one object for each name and unit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._declared: dict[str, Meter] = {}
        self._undeclared: dict[tuple[str, str], Meter] = {}
        self._expected: set[str] = set()

    def declare(self, name: str, unit: str) -> Meter:
        """The meter of a declaration. Raises DeclarationError when another one gave this name another unit."""
        meter = Meter(name, unit)
        with self._lock:
            # What was recorded before its declaration has an object already: two would make two points of one stream.
            known = self._declared.get(name)
            if known is None:
                known = self._declared[name] = self._undeclared.get((name, unit), meter)
                known.uses += name in self._expected
        if known.unit != unit:
            raise DeclarationError(
                f"meter {name!r} is declared with the units {known.unit!r} and {unit!r}: one meter has one unit"
            )
        return known

    def expect(self, name: str) -> None:
        """A middleware will count by this meter, but declares it when it is first called: calls of the meter that have
        begun around it by then must have been looked for from their start."""
        with self._lock:
            if name in self._expected:
                return
            self._expected.add(name)
            known = self._declared.get(name)
            if known is not None:
                known.uses += 1

    def at_call(self, name: str, unit: str | None) -> Meter:
        """The meter of a single recording: its declared unit, else the unit given, else "1".

        Raises DeclarationError for a bad name or unit. A unit that differs from the declared one is kept: the
        amount goes out under the unit that it was counted in, where the collector can tell the two apart.
        """
        known = self._declared.get(name) if isinstance(name, str) else None
        if known is not None and unit in (None, known.unit):
            return known
        key = (name, unit or PLAIN_UNIT)
        try:
            return self._undeclared[key]
        except KeyError:
            meter = Meter(*key)
        with self._lock:
            declared = self._declared.get(name)
            if declared is not None and declared.unit == meter.unit:
                return declared
            if len(self._undeclared) >= MAX_UNDECLARED:
                raise DeclarationError(f"more than {MAX_UNDECLARED} meters are in use: is {name!r} made from data?")
            return self._undeclared.setdefault(key, meter)

    def declared(self) -> list[tuple[str, str]]:
        """(name, unit) of the meters that are declared."""
        with self._lock:
            return [(meter.name, meter.unit) for meter in self._declared.values()]

    def new_lock(self) -> None:
        """After a fork: the inherited lock may be held by a thread that does not exist here."""
        self._lock = threading.Lock()
