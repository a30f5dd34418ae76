"""A remote procedure call as gRPC's server knows it: method, status, bytes of its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import grpc

from tallymark import conventions
from tallymark.calls import NO_ARGUMENTS, OTHER_METHOD, Call, Description, error_name
from tallymark.dimensions import Value

FAILURES: Final = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""The statuses that OpenTelemetry's conventions for gRPC servers count as errors."""

_NUMBERS: Final = {code.name: int(code.value[0]) for code in grpc.StatusCode}
_NAMES: Final = {number: name for name, number in _NUMBERS.items()}

Convert = Callable[[Any], Any]


class GrpcCall(Call):
    """A call of one method. Its `status` is the number of gRPC's status: 0 is OK."""

    __slots__ = ("_method", "context", "final")

    def __init__(self, method: str | None) -> None:
        """`method` as gRPC names it, "/package.Service/Method"; None where the server has none of that name."""
        super().__init__()
        self.request_bytes = 0
        self.response_bytes = 0
        self._method = OTHER_METHOD if method is None else method.removeprefix("/")
        self.context: Any = None
        self.final: str | None = None
        """The name of the status that went out, from when it has."""

    def status_name(self, error: BaseException | None) -> str:
        """The name of the status that such an end of the handler gives the call."""
        if self.final is not None:
            return self.final
        if error is not None and not isinstance(error, Exception):
            return "CANCELLED"
        named = _code_of(self.context) or "OK"
        return "UNKNOWN" if error is not None and named == "OK" else named

    def status(
        self, result: object = None, error: BaseException | None = None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> int | None:
        return _NUMBERS.get(self.status_name(error))

    def header(self, name: str) -> str | None:
        found = (value for key, value in self.context.invocation_metadata() or () if key == name)
        return ",".join(value for value in found if isinstance(value, str)) or None

    def decides_later(self, error: BaseException) -> bool:
        """An interceptor in between may make another status of any exception."""
        return isinstance(error, Exception) and self.final is None

    def describe(
        self, result: object, error: BaseException | None, arguments: Mapping[str, object] = NO_ARGUMENTS
    ) -> Description:
        """(method, status, error type): the class of an exception where the status is a failure, unless `abort()` made
        it, which is the status's own; a cancelled handler's too."""
        status = self.status_name(error)
        failure = status if status in FAILURES else None
        if error is not None and not _is_abort(error) and (failure or not isinstance(error, Exception)):
            failure = error_name(error)
        return self._method, status, failure

    def describe_running(self) -> Description:
        return self._method, None, None

    @staticmethod
    def attributes_of(description: Description) -> Mapping[str, Value | None]:
        method, status, failure = cast("tuple[str | None, ...]", description)
        return {
            conventions.RPC_SYSTEM: "grpc",
            conventions.RPC_METHOD: method,
            conventions.RPC_STATUS: status,
            conventions.ERROR_TYPE: failure,
        }


def counting(handler: Any, call: GrpcCall, is_threaded: bool) -> tuple[Convert, Convert]:
    """A handler's deserializer and serializer, which count what goes through them. What they raise ends the call with
    INTERNAL, on asyncio's servers with UNKNOWN."""

    def deserialize(data: bytes) -> Any:
        call.request_bytes = (call.request_bytes or 0) + len(data)
        try:
            return data if handler.request_deserializer is None else handler.request_deserializer(data)
        except Exception:
            call.final = "INTERNAL" if is_threaded else "UNKNOWN"
            raise

    ready: list[Any] = []  # the last message with its bytes, for who asks twice

    def serialize(message: Any) -> Any:
        if ready and ready[0] is message:
            return ready[1]
        try:
            data = message if handler.response_serializer is None else handler.response_serializer(message)
        except Exception:
            call.final = "INTERNAL" if is_threaded else "UNKNOWN"
            raise
        call.response_bytes = (call.response_bytes or 0) + len(data)
        ready[:] = message, data
        return data

    return deserialize, serialize


class NotingContext:
    """The context of a synchronous handler on an asyncio server, which does not tell the code that was set."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._code: Any = None

    def code(self) -> Any:
        return self._code

    def set_code(self, code: Any) -> None:
        self._code = code
        self._context.set_code(code)

    def abort(self, code: Any, *args: Any, **kwargs: Any) -> Any:
        self._code = code
        return self._context.abort(code, *args, **kwargs)

    def abort_with_status(self, status: Any) -> Any:
        self._code = status.code
        return self._context.abort_with_status(status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _code_of(context: Any) -> str | None:
    """The name of the status that a handler has set."""
    try:
        code = context.code()
    except Exception:
        return None
    return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code)


def _is_abort(error: BaseException) -> bool:
    return type(error) is Exception or isinstance(error, (grpc.aio.AbortError, grpc.aio.BaseError))
