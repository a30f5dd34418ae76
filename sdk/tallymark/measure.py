"""What a call is counted by, where a number or its result does not tell.

    from tallymark import measure, track_usage

    @track_usage("llm.tokens", measure.tokens())                     what the model's answer says of its tokens
    @track_usage("compute", measure.duration("ms"))                  how long the call took
    @track_usage("images", measure.argument("n"), unit="{image}")    one of its arguments
    @track_usage("rows", measure.argument("rows", len))              something of an argument, as it was given
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
from inspect import Signature
from typing import Any, Final

from tallymark.dimensions import Value
from tallymark.errors import DeclarationError, checked_function
from tallymark.quantities import EXACT
from tallymark.tokens import TOKEN_UNIT, Tokens, find_usage
from tallymark.tracked import ArgumentMissingError, Arguments, TrackedCall, argument_reader

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
    so it is recorded then, and once for each meter and request. `is_inside`: it is set from inside the call.
    `of_function`: it needs a decorated function, not a request alone. `note`, if given, makes of the call's `noted`
    (None at first) and each item that a generator yields the next `noted`. `of_arguments`, if given, makes of the
    function's signature what finds the first `noted` in the arguments when the call begins; it raises DeclarationError
    where the function has none that fits.
    """

    amounts: Callable[[TrackedCall], Amounts]
    unit: str = "1"
    waits: bool = False
    is_inside: bool = False
    of_function: bool = False
    note: Callable[[Any, Any], object] | None = None
    of_arguments: Callable[[Signature | None], Arguments] | None = None


class NotGiven:
    """Stands for what `of_arguments` could not find, for the reason `error`."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def of(function: Callable[[TrackedCall], Amounts], unit: str = "1") -> Measure:
    """What `function` makes of the call when it has ended: `.arguments` (as they are then), `.result`, `.error`,
    `.status`, `.duration_s`, `.items`. It gives one quantity; or several, each with attributes of its own, as
    [(2, {"kind": "a"}), (3, {"kind": "b"})] or what else yields such pairs, up to 100,000; or None, and nothing is
    counted."""
    return Measure(checked_function("measure.of()", function), unit)


def argument(name: str, function: Callable[[Any], Quantity] | None = None) -> Measure:
    """The argument of this name, or its default, or what `function` makes of it: what was asked for, whatever became
    of it. It is read when the call begins, before the handler can change it. Decorating a function that has no such
    argument raises DeclarationError."""
    if not isinstance(name, str):
        raise DeclarationError(f"measure.argument() takes the name of an argument, not a {type(name).__name__}")
    if function is not None:
        checked_function(f"measure.argument({name!r})", function)

    def of_arguments(signature: Signature | None) -> Arguments:
        read = argument_reader(signature, name)
        return read if function is None else lambda args, kwargs: function(read(args, kwargs))

    def amounts(call: TrackedCall) -> Amounts:
        noted: Any = call.noted
        if not isinstance(noted, NotGiven):
            return noted  # type: ignore[no-any-return]
        if isinstance(noted.error, ArgumentMissingError) and isinstance(call.error, TypeError):
            return None  # the function could not be called without it either
        raise NotMeasuredError(f"argument {name!r}: {type(noted.error).__name__}: {noted.error}") from noted.error

    return Measure(amounts, of_function=True, of_arguments=of_arguments)


def duration(unit: str = "s") -> Measure:
    """The time from the call to its end, in "s", "ms", "us" or "ns", exact to the nanosecond of the monotonic clock."""
    if unit not in _NANOSECONDS:
        raise DeclarationError(f"measure.duration({unit!r}): the unit must be one of {', '.join(_NANOSECONDS)}")
    places = _NANOSECONDS[unit]
    return Measure(lambda call: EXACT.scaleb(Decimal(call.duration_ns), -places), unit)


def tokens(usage_of: Callable[[Any], object] | None = None) -> Measure:
    """The tokens that a model's answer says it has used, by OpenTelemetry's conventions for generative AI.

    One meter, whose points have `gen_ai.token.type` as a dimension: "input" and "output", and "cache_read" and
    "cache_creation" for input that the provider counts apart; no token is counted twice, so the input of the
    conventions is the sum of three of them. `gen_ai.response.model` stands beside it where the answer names a model.
    Reads OpenAI's, Anthropic's and Gemini's objects, mappings of the same names, Bedrock's Converse, and the names of
    the conventions; of a generator, what its items say until it ends, the sum where it streams several answers.
    `usage_of` finds such an object in another result or item.

    An answer that says nothing of its tokens is refused with a warning, and so is a stream that broke off before it
    said it; a call that raised without an answer counts nothing.
    """
    if usage_of is not None:
        checked_function("measure.tokens()", usage_of)

    def amounts(call: TrackedCall) -> Amounts:
        found: Any = call.noted
        if found is None and call.error is None and call.result is not None:
            usage = find_usage(call.result, usage_of)
            found = None if usage is None else Tokens().and_of(usage)
        if found is not None:
            return found.amounts()  # type: ignore[no-any-return]
        if call.items:
            raise NotMeasuredError("the stream ended without its token usage: ask the model's API to send it")
        if call.error is not None:
            return None
        raise NotMeasuredError(
            f"no token usage in a {type(call.result).__name__}: ask the model's API for it, or give usage_of="
        )

    def note(noted: Any, item: object) -> object:
        found = find_usage(item, usage_of)
        return noted if found is None else (Tokens() if noted is None else noted).and_of(found)

    return Measure(amounts, TOKEN_UNIT, of_function=True, note=note)


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


def _items(call: TrackedCall) -> Amounts:
    if call.items is not None or call.error is not None:
        return call.items
    raise NotMeasuredError(f"measure.items counts what a generator yields, not a {type(call.result).__name__}")


items: Final = Measure(_items, "{item}", of_function=True)
"""What a generator has yielded when it ends."""

inside: Final = Measure(
    lambda call: [(amount, {name: value for name, _, value in key}) for key, amount in call.added.items()],
    is_inside=True,
)
"""What the handler has said by `tallymark.usage.add()`, when it ends. Nothing said, nothing counted."""
