"""Attributes of usage: what divides a meter's sum besides account and plan.

A dimension carries the type that its value has on the wire, because Python takes `1`, `1.0` and `True` for one
dictionary key where OpenTelemetry sees three streams.
"""

import math
from collections.abc import Mapping
from typing import Final

Value = str | bool | int | float
Dimension = tuple[str, str, Value]
"""(name, type on the wire, value)"""
Dimensions = tuple[Dimension, ...]
"""In the order that `ordered` gives, so that one set of attributes is one key."""

MAX_DIMENSIONS: Final = 16
MAX_NAME_LENGTH: Final = 255
MAX_VALUE_LENGTH: Final = 1024

_RESERVED: Final = ("tallymark.", "otel.")


class BadDimensionError(ValueError):
    """An attribute that cannot be sent; the message says which and why."""


def is_text(value: object) -> bool:
    """True for a str that PostgreSQL and protobuf take: no NUL, no lone surrogate."""
    if not isinstance(value, str) or "\0" in value:
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def dimension(name: object, value: object) -> Dimension:
    """One attribute, checked. Raises BadDimensionError, whose message never formats the value itself."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH or not is_text(name):
        raise BadDimensionError(
            f"an attribute's name must be a str of 1 to {MAX_NAME_LENGTH} characters, without NUL or lone surrogates"
        )
    if name.startswith(_RESERVED):
        raise BadDimensionError(f"attribute {name!r}: names under {' and '.join(_RESERVED)} are Tallymark's own")
    return _typed(name, value)


def _typed(name: str, value: object) -> Dimension:
    if isinstance(value, str):
        if len(value) > MAX_VALUE_LENGTH or not is_text(value):
            raise BadDimensionError(
                f"attribute {name!r}: the text is over {MAX_VALUE_LENGTH} characters or holds NUL or a lone surrogate"
            )
        return (name, "string", str.__str__(value))
    if isinstance(value, bool):
        return (name, "bool", value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise BadDimensionError(f"attribute {name!r}: the integer does not fit 64 bits")
        return (name, "int", int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadDimensionError(f"attribute {name!r}: NaN and infinities name no stream")
        return (name, "double", float(value) + 0.0)  # + 0.0 turns -0.0 into 0.0: the two are one key
    raise BadDimensionError(f"attribute {name!r}: a {type(value).__name__} is not str, bool, int or float")


def from_mapping(attributes: Mapping[str, object]) -> tuple[Dimensions, list[str]]:
    """The attributes that can be sent, ordered, and a sentence for each one that cannot. None values are left out."""
    good: list[Dimension] = []
    problems: list[str] = []
    for name, value in attributes.items():
        if value is None:
            continue
        try:
            checked = dimension(name, value)
        except BadDimensionError as error:
            problems.append(str(error))
            continue
        if len(good) >= MAX_DIMENSIONS:
            problems.append(f"attribute {name!r}: more than {MAX_DIMENSIONS} attributes on one recording")
            continue
        good.append(checked)
    return tuple(sorted(good, key=_name_of)), problems


def of_call(attributes: Mapping[str, object], own: Dimensions = ()) -> tuple[Dimensions, list[str]]:
    """The dimensions of a call, OpenTelemetry's attributes where they are known, under the meter's own; and a sentence
    for each one that cannot be sent. What tells them is a framework's, or a function of the service's."""
    items: list[Dimension] = []
    problems: list[str] = []
    for name, value in attributes.items():
        if value is not None:
            try:
                items.append(_typed(name, value))
            except BadDimensionError as error:
                problems.append(str(error))
    return joined(tuple(sorted(items, key=_name_of)), own), problems


def joined(under: Dimensions, over: Dimensions) -> Dimensions:
    """Both, `over` where they have one name. Each of them is ordered, and so is what comes of them."""
    if not over or not under:
        return over or under
    return tuple(sorted({item[0]: item for item in under + over}.values(), key=_name_of))


def _name_of(item: Dimension) -> str:
    return item[0]
