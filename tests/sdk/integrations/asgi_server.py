"""The lifespan protocol from the server's side."""

from __future__ import annotations

from typing import Any, Final

from tallymark.integrations.asgi import UsageMiddleware
from tallymark.integrations.asgi_lifespan import HANDLED

BOTH: Final = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


class Server:
    """Speaks the protocol as a server does, and keeps what it is told."""

    def __init__(self, *messages: str) -> None:
        self._messages = iter(messages)
        self.told: list[str] = []
        self.scope: dict[str, Any] = {"type": "lifespan", "state": {}}

    async def receive(self) -> dict[str, Any]:
        return {"type": next(self._messages)}

    async def send(self, message: Any) -> None:
        self.told.append(message["type"])

    async def run(self, app: Any) -> list[str]:
        await UsageMiddleware(UsageMiddleware(app))(self.scope, self.receive, self.send)
        assert HANDLED not in self.scope
        return self.told
