"""The example service: three endpoints of an API that is paid by the request, by the token and by the byte.

Run it by itself, next to a collector (`tallymark serve`):

    uvicorn tallymark_collector.demo.service:app
    curl -H 'x-api-key: key-acct-017' 'http://127.0.0.1:8000/search?q=time'

What makes it metered: `configure()` and `shutdown()` at the process's two ends, `UsageMiddleware` with a function
that says whose request it is, and `@track_usage` below each route.
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Final

from fastapi import Depends, FastAPI, Header, HTTPException, Response
from pydantic import BaseModel, Field

import tallymark
from tallymark import track_usage
from tallymark.integrations.asgi import Scope, UsageMiddleware
from tallymark_collector.demo.directory import customers
from tallymark_collector.demo.tracing import TracingMiddleware, make_tracer_provider

CUSTOMERS: Final = {known.api_key: known for known in customers(int(os.environ.get("DEMO_ACCOUNTS", "200")))}
ARTICLES: Final = ("Time zones", "Half-open intervals", "Decimal money", "Lost updates", "Time travel by SQL")
FILES: Final = {"logo.svg": 1_409, "terms.txt": 8_192, "manual.pdf": 31_007, "photo.jpg": 65_536}
"""Sizes in bytes; the contents matter to nobody."""

logger = logging.getLogger("uvicorn.error")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """The process's two ends. TALLYMARK_ENDPOINT and TALLYMARK_EXPORT_INTERVAL may say where usage goes, how often."""
    tallymark.configure(resource={"service.name": "demo"})
    yield
    # Here, not at exit: uvicorn ends itself by the signal that it was sent, and then nothing at exit runs. Both wait
    # for the network, so not on the event loop.
    if not await asyncio.to_thread(tallymark.shutdown):
        logger.error("the collector has not acknowledged all usage")
    await asyncio.to_thread(tracer_provider.shutdown)


def whose(scope: Scope) -> Mapping[str, str] | None:
    """The account and plan behind a request's API key."""
    for name, value in scope["headers"]:
        if name == b"x-api-key" and (customer := CUSTOMERS.get(value.decode("latin-1"))):
            return {"account": customer.account, "plan": customer.plan}
    return None


async def known_customer(x_api_key: Annotated[str, Header()] = "") -> None:
    """Turns strangers away before a handler runs, so that nothing is counted for them."""
    if x_api_key not in CUSTOMERS:
        raise HTTPException(401, "send one of our API keys in the header x-api-key")


app = FastAPI(title="Tallymark's example service", lifespan=lifespan)
tracer_provider = make_tracer_provider("demo", os.environ.get("TALLYMARK_ENDPOINT"))
app.add_middleware(TracingMiddleware, provider=tracer_provider)
app.add_middleware(UsageMiddleware, identify=whose)  # the last one added stands outermost
for_customers = [Depends(known_customer)]


@app.get("/search", dependencies=for_customers)
@track_usage("api.requests")
async def search(q: str = "") -> dict[str, list[str]]:
    """A fixed quantity counts every call, whatever its outcome: a 400 is a request too."""
    if not q:
        raise HTTPException(400, "say what to look for, as in ?q=time")
    return {"found": [title for title in ARTICLES if q.lower() in title.lower()]}


class Prompt(BaseModel):
    """What a language model is asked."""

    prompt: str = Field(min_length=1)
    max_tokens: int = Field(64, ge=1, le=4096)


class Completion(BaseModel):
    """What it answers, and how many tokens that took."""

    text: str
    total_tokens: int


@app.post("/completions", dependencies=for_customers)
@track_usage("api.requests")
@track_usage("llm.tokens", quantity=lambda completion: completion.total_tokens, unit="{token}")
async def complete(asked: Prompt) -> Completion:
    """A quantity taken from the result counts only calls that have one: a 503 costs a request and no tokens."""
    words = asked.prompt.split()
    if zlib.crc32(asked.prompt.encode()) % 40 == 0:
        raise HTTPException(503, "the model is busy", headers={"retry-after": "1"})
    return Completion(text=" ".join(reversed(words)), total_tokens=len(words) + asked.max_tokens)


@app.get("/files/{name}", dependencies=for_customers)
@track_usage("api.requests")
@track_usage("egress.bytes", quantity=lambda response: len(response.body), unit="By")
async def download(name: str) -> Response:
    """Bytes out, as they are in the response."""
    if name not in FILES:
        raise HTTPException(404, f"there is no file {name}; there are {', '.join(FILES)}")
    return Response(bytes(FILES[name]), media_type="application/octet-stream")
