"""Two services that run in processes of their own, with OpenTelemetry's instrumentations of server and client.

`front` knows its customers by a key and calls `back`, which knows nobody.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import httpx
from fastapi import FastAPI, Request
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

import tallymark
from tallymark.integrations.asgi import UsageMiddleware


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    tallymark.configure()
    yield
    await asyncio.to_thread(tallymark.shutdown)


def by_key(scope: Any) -> dict[str, str] | None:
    key = dict(scope["headers"]).get(b"x-key")
    return None if key is None else {"account": unquote(key.decode()), "plan": "pro"}


front = FastAPI(lifespan=lifespan)
front.add_middleware(OpenTelemetryMiddleware)
front.add_middleware(UsageMiddleware, identify=by_key)
HTTPXClientInstrumentor().instrument()
client = httpx.AsyncClient(timeout=60)


@front.get("/work")
@tallymark.track_usage("front.calls")
async def work(request: Request) -> str:
    headers = {"x-own": request.headers["x-own"]} if "x-own" in request.headers else {}
    response = await client.get(os.environ["BACK"] + "/part", headers=headers)
    return str(response.json())


def by_own_header(scope: Any) -> dict[str, str | None]:
    return {"account": dict(scope["headers"]).get(b"x-own", b"").decode() or None}


back = FastAPI(lifespan=lifespan)
back.add_middleware(UsageMiddleware, identify=by_own_header)


@back.get("/part")
@tallymark.track_usage("back.calls", quantity=lambda result: result, unit="{part}")
async def part() -> int:
    await asyncio.sleep(0)
    return 3
