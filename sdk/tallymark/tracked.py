"""A call that is being counted, from its begin to its end: what measures and predicates may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from inspect import BoundArguments, Parameter, Signature
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from tallymark.calls import NO_ARGUMENTS, current_call, error_name, status_of
from tallymark.dimensions import Dimensions
from tallymark.errors import DeclarationError
from tallymark.quantities import EXACT, Exact

if TYPE_CHECKING:
    from tallymark.nesting import Running
    from tallymark.tallies import Tally

Arguments = Callable[[tuple[object, ...], Mapping[str, object]], object]
"""Finds something in a call's positional and named arguments. Raises ArgumentMissingError where it was not given."""

NOTHING_ADDED: Final[Mapping[Dimensions, Exact]] = {}


class ArgumentMissingError(Exception):
    """A call without an argument that has no default."""


class TrackedCall:
    """One call of a decorated function, or one request that an integration counts.

    `result` is None where the call raised, `error` where it returned. `items` is what a generator has yielded, None
    where it is no generator. What an integration does not know is None.
    """

    __slots__ = (
        "_kwargs",
        "_stopped_ns",
        "added",
        "args",
        "error",
        "items",
        "noted",
        "result",
        "running",
        "started_ns",
        "tally",
    )

    def __init__(
        self,
        tally: Tally,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] = NO_ARGUMENTS,
        running: Running | None = None,
    ) -> None:
        self.tally = tally
        self.args = args
        self._kwargs = kwargs
        self.running = running
        self.result: object = None
        self.error: BaseException | None = None
        self.items: int | None = None
        self.noted: object = None
        """What the measure has found before the end: in the arguments, or in the items of a generator."""
        self.added = NOTHING_ADDED
        """What was said by `usage.add()`, at the end."""
        self._stopped_ns: int | None = None
        self.started_ns = perf_counter_ns()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The function's arguments by name, with its defaults, as they are now; empty for a request that an
        integration counts. Raises TypeError where the function cannot be called with them, or does not tell its
        signature."""
        if not self.tally.of_function:
            return {}
        bound = self._bound()
        bound.apply_defaults()
        return bound.arguments

    @property
    def keywords(self) -> Mapping[str, object]:
        """The arguments that were given by name."""
        return self._kwargs

    @property
    def duration_s(self) -> Decimal:
        """Seconds from the begin to the end, or to now, exact to the nanosecond of the monotonic clock. A generator's
        consumer is in it."""
        return EXACT.scaleb(Decimal(self.duration_ns), -9)

    @property
    def duration_ns(self) -> int:
        """The same in nanoseconds."""
        return (perf_counter_ns() if self._stopped_ns is None else self._stopped_ns) - self.started_ns

    @property
    def status(self) -> int | None:
        """The status of the answer: the one that the result or the exception names, else what is known of the request;
        None outside a request, and for a call that sent no answer."""
        call = current_call.get()
        if call is None:
            return status_of(self.result if self.error is None else self.error)
        return call.status(self.result, self.error, self._kwargs)

    @property
    def error_type(self) -> str | None:
        """The class of the exception."""
        return error_name(self.error)

    @property
    def request_bytes(self) -> int | None:
        """Bytes of the request's body that have been received."""
        call = current_call.get()
        return None if call is None else call.request_bytes

    @property
    def response_bytes(self) -> int | None:
        """Bytes of the answer's body that have been sent: of all of it where the measure waits for the end."""
        call = current_call.get()
        return None if call is None else call.response_bytes

    def ended(self, result: object = None, error: BaseException | None = None) -> None:
        """Stops the clock and keeps how it ended."""
        self._stopped_ns = perf_counter_ns()
        self.result, self.error = result, error

    def _bound(self) -> BoundArguments:
        signature = self.tally.signature
        if signature is None:
            raise TypeError("the function does not tell its signature")
        return signature.bind(*self.args, **self._kwargs)


def argument_reader(signature: Signature | None, name: str) -> Arguments:
    """Reads the argument `name` of calls of a function, or its default, without binding all of them.

    Raises DeclarationError where the function has no such argument.
    """
    if signature is None:
        raise DeclarationError("it does not tell its arguments")
    parameters = signature.parameters
    rest = next((p.name for p in parameters.values() if p.kind is Parameter.VAR_KEYWORD), None)
    found = parameters.get(name)
    if found is None and rest is None:
        raise DeclarationError(f"it has no argument {name!r}, but {', '.join(map(repr, parameters)) or 'none'}")
    if found is not None and found.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
        raise DeclarationError(f"{name!r} stands for any number of arguments; take measure.of(lambda call: ...)")
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    position = -1 if found is None or found.kind not in by_position else list(parameters).index(name)
    by_name = found is None or found.kind is not Parameter.POSITIONAL_ONLY
    default = Parameter.empty if found is None else found.default

    def read(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if 0 <= position < len(args):
            return args[position]
        if by_name and name in kwargs:
            return kwargs[name]
        if default is Parameter.empty:
            raise ArgumentMissingError(f"the argument {name!r} was not given")
        return default

    return read
