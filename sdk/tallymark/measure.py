"""What a call is counted by, where a number or its result does not tell.

    from tallymark import measure, track_usage

    @track_usage("llm.tokens", measure.tokens())                     what the model's answer says of its tokens
    @track_usage("compute", measure.duration("ms"))                  how long the call took
    @track_usage("images", measure.argument("n"), unit="{image}")    one of its arguments
    @track_usage("egress", measure.response_bytes)                   the body of the answer
    @track_usage("rows", measure.items, unit="{row}")                what a generator has yielded
    @track_usage("credits", measure.inside, unit="{credit}")         what the handler says: usage.add(3)
    @track_usage("work", measure.of(lambda call: call.arguments["n"] * call.result.size))

All of them count calls that raise or are cancelled as well, where they know an amount then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from tallymark.dimensions import Value
from tallymark.errors import DeclarationError
from tallymark.quantities import EXACT
from tallymark.tokens import TOKEN_UNIT, find_usage, merge, tokens_of
from tallymark.tracked import TrackedCall

Quantity = int | float | Decimal
Amounts = Quantity | None | Iterable[tuple[Quantity, Mapping[str, Value]]]
"""One quantity; several, each with attributes of its own; or None: nothing to count."""

_NANOSECONDS: Final = {"ns": 0, "us": 3, "ms": 6, "s": 9}


class NotMeasuredError(Exception):
    """What should be measured is not there; the message says what to do."""


@dataclass(frozen=True)
class Measure:
    """A way to count a call. Where `amounts` raises, the call is refused with a warning, and not billed.

    `unit` is the meter's unless another one is declared. `waits`: the amount is known when the answer has been sent,
    so it is recorded then. `is_inside`: it is set from inside the call. `note`, if given, makes of the call's `noted`
    (None at first) and each item that a generator yields the next `noted`.
    """

    amounts: Callable[[TrackedCall], Amounts]
    unit: str = "1"
    waits: bool = False
    is_inside: bool = False
    note: Callable[[Any, Any], object] | None = None


def of(function: Callable[[TrackedCall], Amounts], unit: str = "1") -> Measure:
    """What `function` makes of the call: `.arguments`, `.result`, `.error`, `.status`, `.duration_s`, `.items`."""
    if not callable(function):
        raise DeclarationError(f"measure.of() takes a function of the call, not a {type(function).__name__}")
    return Measure(function, unit)


def argument(name: str) -> Measure:
    """The argument of this name, or its default: what was asked for, whatever became of it."""
    if not isinstance(name, str):
        raise DeclarationError(f"measure.argument() takes the name of an argument, not a {type(name).__name__}")
    return Measure(lambda call: call.arguments[name])


def duration(unit: str = "s") -> Measure:
    """The time from the call to its end, in "s", "ms", "us" or "ns", exact to the nanosecond of the monotonic clock."""
    if unit not in _NANOSECONDS:
        raise DeclarationError(f"measure.duration({unit!r}): the unit must be one of {', '.join(_NANOSECONDS)}")
    places = _NANOSECONDS[unit]
    return Measure(lambda call: EXACT.scaleb(Decimal(call.duration_ns), -places), unit)


def tokens(usage_of: Callable[[Any], object] | None = None) -> Measure:
    """The tokens that a model's answer says it has used, by OpenTelemetry's conventions for generative AI.

    One meter, whose points have `gen_ai.token.type` as a dimension: "input" and "output", and "cache_read" and
    "cache_creation" for input that the provider counts apart; no token is counted twice. `gen_ai.response.model` stands
    beside it where the answer names a model. Reads OpenAI's and Anthropic's objects, and mappings of the same names;
    of a generator, what its items say in the end. `usage_of` finds such an object in another result or item.
    """

    def amounts(call: TrackedCall) -> Amounts:
        found = call.noted
        if found is None and call.error is None:
            found = find_usage(call.result, usage_of)
            if found is None:
                raise NotMeasuredError(
                    f"no token usage in a {type(call.result).__name__}: ask the model's API for it, or give usage_of="
                )
        return None if found is None else tokens_of(found)

    def note(noted: Any, item: object) -> object:
        found = find_usage(item, usage_of)
        return noted if found is None else merge(noted, found)

    return Measure(amounts, TOKEN_UNIT, note=note)


def _bytes(which: str) -> Callable[[TrackedCall], Amounts]:
    def amounts(call: TrackedCall) -> Amounts:
        size: int | None = getattr(call, which)
        if size is None:
            raise NotMeasuredError("the bytes of a body are counted by Tallymark's middleware, which is not in force")
        return size

    return amounts


request_bytes: Final = Measure(_bytes("request_bytes"), "By", waits=True)
"""Bytes of the request's body that the service has received. Recorded when the answer has been sent."""

response_bytes: Final = Measure(_bytes("response_bytes"), "By", waits=True)
"""Bytes of the answer's body that have been sent, as they left the service. Recorded when the answer has been sent."""

items: Final = Measure(lambda call: call.items, "{item}")
"""What a generator has yielded when it ends."""

inside: Final = Measure(
    lambda call: [(amount, {name: value for name, _, value in key}) for key, amount in call.added.items()],
    is_inside=True,
)
"""What the handler has said by `tallymark.usage.add()`, when it ends. Nothing said, nothing counted."""
