"""gRPC servers: method, status, identity and bytes of every call, of all four kinds of methods.

grpc.server(pool, interceptors=[UsageInterceptor(identify=whose, track=[track_usage("calls")])])
grpc.aio.server(interceptors=[AsyncUsageInterceptor(identify=whose, track=[track_usage("calls")])])
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from contextvars import copy_context
from typing import Any, Final

import grpc

from tallymark.calls import current_call
from tallymark.integrations.grpc_calls import GrpcCall, NotingContext, counting
from tallymark.integrations.serving import Requests, Resolver, Served, Track

Behavior = Callable[[Any, Any], Any]

_BEHAVIORS: Final = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class _Interceptor:
    """What both kinds of servers have in common.

    `identify`, if given, is called with the servicer context of each call (`invocation_metadata()`,
    `peer_identities()`, `auth_context()`) and returns whom it is for: an `Identity`, a mapping with any of account,
    user and plan, or None when that is not known yet. It must not block. When it raises, the call goes on and its usage
    is recorded without an account. Methods of the service may call `tallymark.identify()` later.

    `track`: what `track_usage()` made, to count every call by, also one of a method that the server does not have. It
    counts when the call has ended for the server: after the client's last word, by the status that went out, once,
    however that was. A call whose request cannot be decoded reaches no interceptor and is not counted.

    Bytes are those of the serialized messages, before compression and without frames. A billable function sees gRPC's
    number as `call.status`. A streaming method without `async` on an asyncio server is counted when its generator ends:
    that server does not tell it that its client has left. Interceptors before this one that refuse a call leave nothing
    to count: put it first.
    """

    def __init__(self, identify: Resolver[Any] | None = None, track: Track = ()) -> None:
        self._requests: Requests[Any] = Requests(type(self).__name__, identify, track)

    def _metered(self, handler: Any, method: str | None) -> Any:
        """A handler for this one call, with all that is known of it."""
        call = GrpcCall(method)
        deserialize, serialize = counting(handler, call, isinstance(self, grpc.ServerInterceptor))
        name, make = _BEHAVIORS[bool(handler.request_streaming), bool(handler.response_streaming)]
        behavior: Behavior = getattr(handler, name)
        rpc = _Rpc(self._requests, call, serialize)
        return make(rpc.around(behavior, handler.response_streaming), deserialize, serialize)


class UsageInterceptor(_Interceptor, grpc.ServerInterceptor):
    __doc__ = f"For `grpc.server()`. {_Interceptor.__doc__}"

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return self._metered(grpc.stream_stream_rpc_method_handler(_unimplemented), None)
        return self._metered(handler, handler_call_details.method)


class AsyncUsageInterceptor(_Interceptor, grpc.aio.ServerInterceptor):
    __doc__ = f"For `grpc.aio.server()`. {_Interceptor.__doc__}"

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return self._metered(grpc.stream_stream_rpc_method_handler(_unimplemented_async), None)
        return self._metered(handler, handler_call_details.method)


def _unimplemented(requests: Iterator[Any], context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield  # pragma: no cover - it is a generator, as its kind of method needs


async def _unimplemented_async(requests: AsyncIterator[Any], context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class _Rpc:
    """One call, from its handler's begin to the server's last word on it."""

    def __init__(self, requests: Requests[Any], call: GrpcCall, serialize: Callable[[Any], Any]) -> None:
        self._requests = requests
        self._call = call
        self._serialize = serialize
        self._served: Served | None = None
        self._ends_with_handler = False
        self._error: BaseException | None = None
        self._returned = False

    def around(self, behavior: Behavior, is_streaming: bool) -> Behavior:
        """The behavior, of the same kind as before: servers ask what it is."""
        if inspect.isasyncgenfunction(behavior):
            return self._around_async_generator(behavior)
        if inspect.iscoroutinefunction(behavior):
            return self._around_coroutine(behavior)
        return self._around_streaming(behavior) if is_streaming else self._around_unary(behavior)

    # Threads of a server's pool take part in many calls: each has a context of its own there, as tasks have anyway.

    def _around_unary(self, behavior: Behavior) -> Behavior:
        def served(request: Any, context: Any) -> Any:
            return copy_context().run(self._run, behavior, request, context)

        return served

    def _around_streaming(self, behavior: Behavior) -> Behavior:
        def served(request: Any, context: Any) -> Iterator[Any]:
            own = copy_context()
            responses = iter(own.run(self._run, behavior, request, context, False))
            while True:
                try:
                    response = own.run(next, responses)
                except StopIteration:
                    self._returned = True
                    self._handler_ended()
                    return
                except BaseException as error:
                    self._error = error
                    self._handler_ended()
                    raise
                try:
                    yield response
                except GeneratorExit:
                    close = getattr(responses, "close", None)
                    if close is not None:
                        own.run(close)
                    self._handler_ended()
                    raise

        return served

    def _run(self, behavior: Behavior, request: Any, context: Any, is_last: bool = True) -> Any:
        try:
            result = behavior(request, self._begin(context))
        except BaseException as error:
            self._error = error
            self._handler_ended()
            raise
        if is_last:
            self._returned = True
            if self._ends_with_handler:
                if self._call.status_name(None) == "OK":  # else it sends no message
                    with suppress(Exception):  # the server will ask again, and find out for itself
                        self._serialize(result)
                self._handler_ended()
        return result

    def _around_coroutine(self, behavior: Behavior) -> Behavior:
        async def served(request: Any, context: Any) -> Any:
            try:
                result = await behavior(request, self._begin(context))
            except BaseException as error:
                self._error = error
                raise
            self._returned = True
            return result

        return served

    def _around_async_generator(self, behavior: Behavior) -> Behavior:
        async def served(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async with aclosing(behavior(request, self._begin(context))) as responses:
                    async for response in responses:
                        yield response
            except BaseException as error:
                self._error = error
                raise
            self._returned = True

        return served

    def _begin(self, context: Any) -> Any:
        around = current_call.get()
        if isinstance(around, GrpcCall) and around.context is context:
            self._requests.begin(around, context)  # another interceptor of ours serves it
            return context
        self._ends_with_handler = not hasattr(context, "code")
        if self._ends_with_handler:
            context = NotingContext(context)
        self._call.context = context
        self._served = self._requests.begin(self._call, context)
        # Threads of the server call it, and tasks: when it has sent its status, or learns that nobody waits for one.
        if hasattr(context, "add_done_callback"):
            context.add_done_callback(self._ended)
        elif not self._ends_with_handler and not context.add_callback(self._ended):
            self._ended()
        return context

    def _handler_ended(self) -> None:
        """An asyncio server does not tell the synchronous handlers that it runs in threads how their calls end."""
        if self._ends_with_handler:
            self._ended()

    def _ended(self, *_: object) -> None:
        self._call.final = self._final()
        if self._served is not None:
            # A cancellation is the status itself.
            self._served.answered(self._error if isinstance(self._error, Exception) else None)
        self._call.context = None

    def _final(self) -> str:
        """The name of the status that ended the call."""
        if self._returned or isinstance(self._error, Exception):
            return self._call.status_name(self._error)
        left = None if self._call.context is None else self._call.context.time_remaining()
        return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
