"""ASGI: method, route, identity and bytes of the requests of Starlette, FastAPI, Litestar and other applications.

app.add_middleware(UsageMiddleware, identify=lambda scope: {"account": account_of(scope)})
"""

from __future__ import annotations

from typing import Final

from tallymark import runtime
from tallymark.errors import DeclarationError, checked_function
from tallymark.integrations.asgi_calls import AsgiCall, ScopeCall, WebSocketCall
from tallymark.integrations.asgi_lifespan import serve_lifespan
from tallymark.integrations.asgi_types import App, Message, Receive, Scope, Send
from tallymark.integrations.serving import ASYNC_WAY, Requests, Resolver, Track

__all__ = ["CALL", "App", "Message", "Receive", "Scope", "Send", "UsageMiddleware"]

_NAME: Final = "UsageMiddleware"

CALL: Final = "tallymark.call"
"""Where a scope keeps the call that is being served: also in the copies that frameworks make of it."""


class UsageMiddleware:
    """Pure ASGI middleware. Add it outermost, so that it stands around authentication and routing.

    `identify`, if given, is called with the scope of each HTTP request and each websocket and returns whom it is for:
    an `Identity`, a mapping with any of account, user and plan, or None when that is not known yet. It must not block.
    When it raises, the request goes on and its usage is recorded without an account. So it is where it cannot be a
    resolver at all, as an `async def`: that is told in the log when the middleware is made. Handlers and dependencies,
    synchronous ones too, may call `tallymark.identify()` later.

    `track`: what `track_usage()` made, to count every HTTP request by, also one that finds no route, is refused or
    fails before it reaches a handler. It counts when the answer has been sent, by the status that went out.
    `error.type` is "IncompleteAnswerError" where the client went away before the end of it.

    Another one inside, around a mounted application for instance, adds what it identifies and tracks.

    When the server tells of its end by the lifespan protocol, what is left is delivered before the server goes on, for
    which it waits no longer than the `shutdown_timeout`. An application that does not support the protocol is answered
    for; what one of Starlette, FastAPI or Litestar raises is the server's to know.
    """

    supports_lifespan = False
    """For whoever knows that `app` supports the protocol where that cannot be seen."""

    def __init__(self, app: App, identify: Resolver[Scope] | None = None, track: Track = ()) -> None:
        self.app = app
        resolver = None if identify is None else _resolver_that_serves(identify)
        self._requests = Requests(_NAME, resolver, track)
        self._websockets = Requests(_NAME, resolver, ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(self._requests, AsgiCall, scope, receive, send)
        elif scope["type"] == "websocket":
            await self._serve(self._websockets, WebSocketCall, scope, receive, send)
        elif scope["type"] == "lifespan":
            await serve_lifespan(self.app, scope, receive, send, self.supports_lifespan)
        else:
            await self.app(scope, receive, send)

    async def _serve(
        self, calls: Requests[Scope], kind: type[ScopeCall], scope: Scope, receive: Receive, send: Send
    ) -> None:
        known = scope.get(CALL)
        call = known if isinstance(known, ScopeCall) else kind(scope)
        first = call is not known
        scope[CALL] = call
        served = calls.begin(call, scope)
        if first:
            receive, send = call.counting(served, receive, send)
        try:
            # The scope itself, not a copy: routers write the matched route into it.
            await self.app(scope, receive, send)
        except BaseException as error:
            served.end(error)
            raise
        else:
            served.end(call.incomplete() if first else None)
        finally:
            if first:
                del scope[CALL]  # call and scope would keep each other alive


def _resolver_that_serves(identify: Resolver[Scope]) -> Resolver[Scope]:
    """The resolver, or in the place of one that cannot be one that raises when it is asked. Starlette's
    `add_middleware` makes this middleware with the first message: what is raised here would be every request's 500."""
    try:
        checked_function(f"{_NAME}: identify", identify, ASYNC_WAY)
    except DeclarationError as error:
        message = str(error)
        runtime.current().reporter.error(
            "resolver.declared", "%s; until that is mended, requests are recorded without an account", message
        )

        def refuse(scope: Scope) -> None:
            raise DeclarationError(message)

        return refuse
    return identify
