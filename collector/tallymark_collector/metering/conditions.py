"""What a source of usage asks of a name or of an attribute: equal, one of, a pattern, a range, there or not.

Attributes are compared as text, the way a person writes them in a file: the integer 200, the double 200.0 (JavaScript
sends integers so) and the text "200" are all `200`, true is `true`. Arrays, maps and bytes have no such text: they can
be there or not, and match nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Final

from pydantic import PlainValidator

from tallymark_collector.documents.fields import MAX_TEXT, near, wrong
from tallymark_collector.model import Attributes, AttributeValue
from tallymark_collector.wire import shortest_decimal

_NUMBER: Final = re.compile(r"-?[0-9]{1,25}(\.[0-9]{1,25})?", re.ASCII)
_KNOWN: Final = ("is", "not", "present", "from", "to")


@dataclass(frozen=True, slots=True)
class Glob:
    """A text in which `*` stands for any characters and `?` for one."""

    text: str
    literal: bool = False
    """True: `*` and `?` are themselves."""
    _pieces: tuple[re.Pattern[str], ...] = field(init=False, compare=False)
    """What stands before, between and behind the `*`."""

    def __post_init__(self) -> None:
        pieces = [self.text] if self.literal else self.text.split("*")
        wild = not self.literal and ("*" in self.text or "?" in self.text)
        patterns = ("".join("." if c == "?" else re.escape(c) for c in piece) for piece in pieces)
        found = tuple(re.compile(pattern, re.DOTALL) for pattern in patterns) if wild else ()
        object.__setattr__(self, "_pieces", found)

    @property
    def exact(self) -> bool:
        """True if only this very text matches."""
        return not self._pieces

    def matches(self, text: str) -> bool:
        """True if the whole text fits. In time that grows with its length alone: senders choose it, and one pattern
        with two `*` would take its square."""
        if not self._pieces:
            return text == self.text
        first, *others = self._pieces
        if not others:
            return first.fullmatch(text) is not None
        found = first.match(text)
        for piece in others[:-1]:
            # Where it stands first is as good as any later place.
            found = found and piece.search(text, found.end())
        if found is None:
            return False
        last = len(text) - len(self.text.rpartition("*")[2])
        return last >= found.end() and others[-1].match(text, last) is not None


@dataclass(frozen=True, slots=True)
class Condition:
    """What one attribute has to be. All that is given must hold."""

    any_of: tuple[Glob, ...] = ()
    none_of: tuple[Glob, ...] = ()
    """Holds where the attribute is not there, too."""
    present: bool | None = None
    lowest: Decimal | None = None
    highest: Decimal | None = None
    written: str = field(default="", compare=False)
    """As it stands in the file."""

    def holds(self, value: AttributeValue) -> bool:
        """True if the attribute's value (None: not there) is what is asked for."""
        if self.present is not None and (value is not None) is not self.present:
            return False
        text = as_text(value)
        if self.any_of and (text is None or not any(glob.matches(text) for glob in self.any_of)):
            return False
        if text is not None and any(glob.matches(text) for glob in self.none_of):
            return False
        if self.lowest is None and self.highest is None:
            return True
        if text is None or isinstance(value, bool) or not _NUMBER.fullmatch(text):
            return False
        number = Decimal(text)
        return (self.lowest is None or self.lowest <= number) and (self.highest is None or number <= self.highest)


def as_text(value: AttributeValue) -> str | None:
    """An attribute's value as a person writes it, or None where it has no such text."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if math.isfinite(value):
            text = format(shortest_decimal(value), "f")
            return text.rstrip("0").rstrip(".") if "." in text else text
        case _:
            return None


def failing(conditions: Mapping[str, Condition], attributes: Attributes) -> str | None:
    """The first attribute that is not what is asked for, or None."""
    return next((name for name, one in conditions.items() if not one.holds(attributes.get(name))), None)


def _glob(value: object, *, literal: bool = False) -> Glob:
    if not isinstance(value, str) or not value:
        raise wrong(f"expected a text, e.g. kong or http.*, got {_shown(value)}")
    if len(value) > MAX_TEXT:
        raise wrong(f"at most {MAX_TEXT} characters, got {len(value)}")
    if not literal and re.fullmatch("[1-5][xX]{2}", value):
        first = value[0]
        raise wrong(f"{value} would be taken letter by letter; write {first}??, or {{from: {first}00, to: {first}99}}")
    return Glob(value, literal)


def _globs(value: object) -> tuple[Glob, ...]:
    if isinstance(value, list) and not value:
        raise wrong("an empty list matches nothing; name what is asked for")
    return tuple(_glob(each) for each in value) if isinstance(value, list) else (_glob(value),)


def _condition(value: object) -> Condition:
    if isinstance(value, Condition):
        return value
    if not isinstance(value, dict):
        return Condition(any_of=_globs(value), written=_shown(value))
    for name in value:
        if name not in _KNOWN:
            meant = near(name, _KNOWN, "; did you mean ")
            raise wrong(f"a condition is a text, a list of texts, or has {', '.join(_KNOWN)}, not {name!r}{meant}")
    if not value:
        raise wrong("an empty condition; write {present: true} where any value will do")
    found = Condition(
        any_of=(_glob(value["is"], literal=True),) if "is" in value else (),
        none_of=_globs(value["not"]) if "not" in value else (),
        present=_flag(value["present"]) if "present" in value else None,
        lowest=_number(value["from"], "from") if "from" in value else None,
        highest=_number(value["to"], "to") if "to" in value else None,
        written=_shown(value),
    )
    if found.lowest is not None and found.highest is not None and found.lowest > found.highest:
        raise wrong(f"from {found.lowest} to {found.highest} is empty; swap them")
    return found


def _flag(value: object) -> bool:
    if value not in ("true", "false"):
        raise wrong(f"present is true or false, got {_shown(value)}")
    return value == "true"


def _number(value: object, name: str) -> Decimal:
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        raise wrong(f"{name} is a number in plain digits, e.g. 200, got {_shown(value)}")
    return Decimal(value)


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case dict():
            return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_shown, value)) + "]"
        case _:
            return str(value)


Pattern = Annotated[Glob, PlainValidator(_glob)]
Patterns = Annotated[tuple[Glob, ...], PlainValidator(_globs)]
Asked = Annotated[Condition, PlainValidator(_condition)]
