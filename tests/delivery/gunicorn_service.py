"""A service for gunicorn, in both of Python's interfaces. Each request is counted for the account in its query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import tallymark

tallymark.configure()


@tallymark.track_usage("api.requests")
def handle() -> bytes:
    return b"done\n"


@tallymark.track_usage("api.requests")
async def handle_async() -> bytes:
    await asyncio.sleep(0.001)
    return b"done\n"


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    with tallymark.identify(account=environ["QUERY_STRING"]):
        body = handle()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def asgi(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    if scope["type"] != "http":
        return
    with tallymark.identify(account=scope["query_string"].decode()):
        body = await handle_async()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
