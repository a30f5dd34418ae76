"""A metered FastAPI service, as small as it gets. In one terminal the collector, in another the service:

    tallymark serve
    TALLYMARK_ENDPOINT=http://127.0.0.1:4317 uvicorn --app-dir examples fastapi_service:app

then a call, and after ten seconds (TALLYMARK_EXPORT_INTERVAL) what it cost whom:

    curl -H 'x-account: acme' 'http://127.0.0.1:8000/greetings/ada?times=3'
    tallymark usage --by account,route,status
"""

import asyncio
from contextlib import asynccontextmanager

from fastapi import FastAPI

import tallymark
from tallymark.integrations.asgi import UsageMiddleware


@asynccontextmanager
async def lifespan(_):
    tallymark.configure(resource={"service.name": "greeter"})
    yield
    await asyncio.to_thread(tallymark.shutdown)  # sends what is left; a signal may leave no later chance


def whose(scope):
    """Yours would look up an API key or a token; a header that anybody can set is good for trying only."""
    return {"account": dict(scope["headers"]).get(b"x-account", b"").decode("latin-1") or None}


app = FastAPI(lifespan=lifespan)
app.add_middleware(UsageMiddleware, identify=whose)


@app.get("/greetings/{name}")
@tallymark.track_usage("api.requests")
@tallymark.track_usage("greetings", quantity=len, unit="{greeting}")
async def greet(name: str, times: int = 1) -> list[str]:
    return [f"Hello, {name}!"] * min(times, 100)
