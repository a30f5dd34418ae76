"""The example service with one more endpoint: it answers what a line of an access log says that a site answered.

Status and body size come in headers, as does the client's address, which is the account.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Response
from fastapi.responses import StreamingResponse

import tallymark
from tallymark import track_usage
from tallymark_collector.demo.service import app

BLOCK = memoryview(bytes(256 * 1024))
NO_BODY = 304


def declared(response: Response) -> int:
    """Bytes out, by the response's own header."""
    return int(response.headers.get("content-length", 0))


@app.api_route("/replay/{path:path}", methods=["GET", "HEAD", "POST", "OPTIONS"])
@track_usage("api.requests")
@track_usage("egress.bytes", quantity=declared, unit="By")
async def replay(
    x_client_address: Annotated[str, Header()], x_status: Annotated[int, Header()], x_size: Annotated[int, Header()]
) -> Response:
    tallymark.identify(account=x_client_address)
    if x_status == NO_BODY:
        return Response(status_code=x_status)
    if x_size <= len(BLOCK):
        return Response(BLOCK[:x_size], x_status, media_type="application/octet-stream")
    # The largest body has 69 MB: it is sent in pieces of the one block.
    return StreamingResponse(_pieces(x_size), x_status, {"content-length": str(x_size)}, "application/octet-stream")


async def _pieces(size: int) -> AsyncIterator[memoryview]:
    for sent in range(0, size, len(BLOCK)):
        yield BLOCK[: size - sent]
