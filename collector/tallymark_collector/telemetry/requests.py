"""The request that is under way in this context, and how requests ended.

A receiver opens a `Call`; whoever learns more of the request says so to `current()`. Lines of the log take from there
which trace, tenant and protocol they are of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Final, NamedTuple

from tallymark_collector.telemetry.tenants import Tenants

OK: Final = "OK"
PARTIAL: Final = "PARTIAL_SUCCESS"
"""Committed, and something of it refused for good."""
CANCELLED: Final = "CANCELLED"
"""The client hung up, or the collector stopped."""
BROKEN_OFF: Final = "BrokenOff"
"""The error of a call over gRPC that was over before its message was whole: gRPC itself has refused that (it was far
too large, or compressed by nothing that gRPC knows), or the client hung up in the middle."""

TRACEPARENT: Final = "traceparent"
# W3C Trace Context: later versions may add fields, and ff is none. Zeros mean that there is no trace.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)

_current: ContextVar[Call | None] = ContextVar("tallymark_call", default=None)


class Answered(NamedTuple):
    """What requests are told apart by."""

    tenant: str
    protocol: str
    signal: str
    answer: str
    """google.rpc's code, in both protocols, or PARTIAL_SUCCESS."""
    error: str
    """The kind of error; "" where there was none."""


class Trace(NamedTuple):
    """The client's span, in hexadecimal."""

    trace_id: str
    span_id: str


class Call:
    """One request from its arrival to its answer. A context manager; counted at its end."""

    __slots__ = ("_answer", "_error", "_requests", "_token", "protocol", "signal", "size", "tenant", "traceparent")

    def __init__(self, requests: Requests, protocol: str, signal: str, traceparent: str) -> None:
        self.protocol = protocol
        self.signal = signal
        self.traceparent = traceparent
        self.tenant = ""
        """Whose it is; "" until that is known."""
        self.size = 0
        """Bytes of the request, once they are all there."""
        self._requests = requests
        self._answer = CANCELLED
        self._error = ""
        self._token: Token[Call | None] | None = None

    @property
    def trace(self) -> Trace | None:
        """The trace that the client says this is part of; read when somebody asks."""
        found = _TRACEPARENT.fullmatch(self.traceparent)
        return found and Trace(found[1], found[2])

    def committed(self, *, partial: bool) -> None:
        """The answer is success."""
        self._answer = PARTIAL if partial else OK

    def refused(self, code: str, error: Exception) -> None:
        """The answer is an error."""
        self._answer, self._error = code, type(error).__name__

    def broke_off(self) -> None:
        """Nobody can be answered: there was an end before the request was there."""
        self._error = BROKEN_OFF

    def __enter__(self) -> Call:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)
        tenant = self._requests.tenants.label(self.tenant)
        self._requests.answered[Answered(tenant, self.protocol, self.signal, self._answer, self._error)] += 1
        if self.size:
            self._requests.received[tenant, self.protocol] += self.size


class Requests:
    """Requests of this process since it started."""

    def __init__(self) -> None:
        self.tenants = Tenants()
        self.answered: Counter[Answered] = Counter()
        self.received: Counter[tuple[str, str]] = Counter()
        """Bytes by tenant and protocol."""

    def call(self, protocol: str, signal: str, traceparent: str = "") -> Call:
        """A request that has arrived, as a context manager. `traceparent` may be whatever a client sent."""
        return Call(self, protocol, signal, traceparent)


def current() -> Call | None:
    """The request that this context works for."""
    return _current.get()


def of_tenant(tenant: str) -> None:
    """The current request is that tenant's: said as soon as its credential has said it, whatever becomes of it."""
    call = _current.get()
    if call is not None:
        call.tenant = tenant


def arrived(size: int) -> None:
    """The current request has so many bytes, decompressed, and they are all there."""
    call = _current.get()
    if call is not None:
        call.size = size


def broke_off() -> None:
    """The current request ended before it was all there, and its call with it."""
    call = _current.get()
    if call is not None:
        call.broke_off()


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The header `traceparent` of a call's metadata; "" where there is none."""
    for key, value in metadata or ():
        if key == TRACEPARENT:
            return value if isinstance(value, str) else ""
    return ""
