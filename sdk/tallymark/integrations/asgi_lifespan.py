"""The end of an ASGI service: what is left is delivered before the server is told that the application has ended.

Servers end by a signal: uvicorn raises SIGTERM again once it has closed, and no exit handler runs. The lifespan
protocol is what tells of the end before that.
"""

from __future__ import annotations

import asyncio
from typing import Final

from tallymark import runtime
from tallymark.integrations.asgi_types import App, Message, Receive, Scope, Send
from tallymark.reporting import logger
from tallymark.settings import DEFAULT_SHUTDOWN_S

HANDLED: Final = "tallymark.lifespan"
"""Marks a scope whose end is seen to already, for the middlewares inside."""

MAX_WRAPPED: Final = 100
"""Middlewares around an application that are looked through, to see what it is."""

THREAD_PATIENCE_S: Final = 1.0
"""How much longer than the `shutdown_timeout` an event loop waits for the thread that delivers, which handlers' threads
may keep from its turn."""


# The classes of frameworks that take part in the protocol, by their modules. Not their middlewares: these may stand
# around any application.
_SUPPORTING: Final = ("starlette.applications", "starlette.routing", "fastapi.applications", "litestar.app")


async def serve_lifespan(app: App, scope: Scope, receive: Receive, send: Send, supported: bool = False) -> None:
    """The application's lifespan, with a delivery at its end. An application that does not support the protocol
    (Django raises, others return at once) is answered for, so that the server tells of the end at all. With
    `supported`, or where the application is seen to be of a framework that does, what it raises is its own failure."""
    supported = supported or supports_lifespan(app)
    around = scope.get(HANDLED)
    if around is not None:
        if supported and isinstance(around, _Protocol):
            around.is_known = True
        await app(scope, receive, send)
        return
    scope[HANDLED] = protocol = _Protocol(receive, send, supported)
    try:
        await app(scope, protocol.receive, protocol.send)
    except Exception as error:
        if protocol.is_known:
            # The application's own failure, which the server has to know.
            await protocol.ended()
            raise
        if type(error) is ValueError and "lifespan" in str(error):  # as Django and Channels say that they do not
            logger.info("the application does not support the lifespan protocol, it is answered for: %r", error)
        else:
            logger.warning(
                "the application raised %s in its lifespan before it received anything: it is taken for one that does "
                "not support the protocol, and is served; if it is broken, the server has not been told",
                type(error).__name__,
                exc_info=error,
            )
    finally:
        scope.pop(HANDLED, None)
    try:
        await protocol.complete()
    except Exception as error:
        runtime.current().reporter.error(
            "lifespan", "the server's lifespan protocol broke off: %r", error, exc_info=error
        )


def supports_lifespan(app: object) -> bool:
    """Whether it is seen to be an application of a framework that takes part in the protocol, under its middlewares.
    No framework is imported for it."""
    for _ in range(MAX_WRAPPED):
        if any(kind.__module__ in _SUPPORTING for kind in type(app).__mro__):
            return True
        try:
            app = getattr(app, "app", None)
        except Exception:
            return False
        if app is None:
            return False
    return False


class _Protocol:
    """What has been said between the server and the application."""

    def __init__(self, receive: Receive, send: Send, is_known: bool) -> None:
        self.is_known = is_known
        """Whether the application takes part in it."""
        self._receive = receive
        self._send = send
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._delivered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_known = True
        self._received.add(message["type"])
        return message

    async def send(self, message: Message) -> None:
        if message["type"].startswith("lifespan.shutdown."):
            await self._deliver()
        self.is_known = True
        self._sent.add(message["type"])
        await self._send(message)

    async def ended(self) -> None:
        """The application has ended: at the server's end, or before."""
        if "lifespan.shutdown" in self._received:
            await self._deliver()

    async def complete(self) -> None:
        """Says what an application that has returned has left unsaid."""
        if "lifespan.startup.failed" in self._sent:
            return
        for asked in ("lifespan.startup", "lifespan.shutdown"):
            if asked not in self._received and (await self.receive())["type"] != asked:
                return
            if not self._sent & {f"{asked}.complete", f"{asked}.failed"}:
                await self.send({"type": f"{asked}.complete"})

    async def _deliver(self) -> None:
        if self._delivered:
            return
        self._delivered = True
        current = runtime.current()
        timeout_s = DEFAULT_SHUTDOWN_S if current.settings is None else current.settings.shutdown_timeout_s
        try:
            if _has_event_loop():
                await asyncio.wait_for(asyncio.to_thread(runtime.finish), timeout_s + THREAD_PATIENCE_S)
            else:  # another library's: nobody is served any more whom this could hold up
                runtime.finish()
        except Exception as error:
            current.reporter.error("lifespan", "usage could not be delivered at the end: %r", error, exc_info=error)


def _has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
