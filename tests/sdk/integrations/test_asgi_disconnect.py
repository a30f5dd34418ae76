"""Answers whose client goes away: before they are complete, or as they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tallymark import measure, track_usage
from tallymark.integrations.asgi import UsageMiddleware
from tallymark.testing import Captured
from tests.sdk.integrations.clients import rows


def metered(app: Any) -> UsageMiddleware:
    return UsageMiddleware(app, track=[track_usage("requests"), track_usage("egress", measure.response_bytes)])


@pytest.mark.parametrize("kind", ["body", "pathsend"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("status", [200, 503])
async def test_a_disconnect_that_is_told_before_the_last_send_returns(
    usage: Captured, tmp_path: Any, kind: str, fails: bool, status: int
) -> None:
    """It comes after every answer, and leaves one that is complete as it is; where the server says that it could not
    send it, it is none."""
    complete, told = asyncio.Event(), asyncio.Event()
    file = tmp_path / "file"
    file.write_bytes(b"xx")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> None:
            assert (await receive())["type"] == "http.disconnect"
            told.set()

        listening = asyncio.create_task(listen())
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        last = {"body": b"xx"} if kind == "body" else {"path": str(file)}
        try:
            await send({"type": f"http.response.{kind}", **last})
        except OSError:
            assert fails
        await listening

    async def receive() -> dict[str, str]:
        await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == f"http.response.{kind}" and not message.get("more_body"):
            complete.set()
            await told.wait()
            if fails:
                raise OSError("the client has gone")

    await metered(app)({"type": "http", "method": "GET", "headers": []}, receive, send)
    error = "IncompleteAnswerError" if fails else None if status == 200 else "503"
    assert rows(usage, "requests") == {(None, "GET", None, status, error): 1}
    assert usage.total("egress") == (1 if fails else 3)


async def test_a_disconnect_between_parts_makes_an_answer_incomplete(usage: Captured) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"x"})

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def ignore(message: Any) -> None:
        pass

    await metered(app)({"type": "http", "method": "GET", "headers": []}, receive, ignore)
    assert rows(usage, "requests") == {(None, "GET", None, 200, "IncompleteAnswerError"): 1}
