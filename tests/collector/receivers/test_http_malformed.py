"""What is answered to a head that is no HTTP: nothing of what it holds, on either port."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest

from tallymark_collector.receivers.admin import Admin, administering
from tests.collector.receivers.test_http_connections import HEAD, exchange
from tests.support.receiving import Counting, receiving

SECRET = "tmk_abcdefghijkl_GEHEIM"
BEARER = f"Authorization: Bearer {SECRET}"
TOO_LONG = f"{HEAD}{BEARER}{'a' * 9000}\r\n\r\n"
MALFORMED = {
    "a control character": f"{HEAD}{BEARER}\x01\r\n\r\n",
    "a long header": TOO_LONG,
    "a long header in pieces": TOO_LONG[:-5],
    "a long line": f"POST /v1/metrics?api_key={SECRET}{'a' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": HEAD + "".join(f"{SECRET}{i}: {SECRET}\r\n" for i in range(500)) + "\r\n",
    "no colon": f"{HEAD}{BEARER.replace(':', '')}\r\n\r\n",
    "a folded header": f"{HEAD}X: a\r\n {BEARER}\r\n\r\n",
    "a path": f"POST /v1/metrics?api_key={SECRET}\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    "an address": f"POST http://[{SECRET}/v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method": f"{SECRET}\x01 / HTTP/1.1\r\n\r\n",
    "a version": f"POST / HTTP/{SECRET}\r\n\r\n",
    "a length": f"{HEAD}Content-Length: {SECRET}\r\n\r\n",
    "a transfer coding": f"{HEAD}Transfer-Encoding: {SECRET}\r\n\r\n",
    "a chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{SECRET}\r\n0\r\n\r\n",
    "a second request": f"{HEAD}Content-Length: 0\r\n\r\n{SECRET}\x01\r\n\r\n",
    "no HTTP": f"{SECRET}\r\n\r\n",
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
async def test_nothing_of_a_malformed_head_is_answered_or_logged(sent: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with receiving(Counting()) as server:
        answer = (await exchange(server, sent.encode("latin-1"))).decode("latin-1")
    head, _, body = answer.partition("\r\n\r\n")
    assert re.match(r"HTTP/1\.[01] 4", head), answer
    assert "GEHEIM" not in answer + caplog.text
    assert "Server: tallymark" in head
    assert "ython" not in head
    assert json.loads(body)["message"] if "application/json" in head else body


@pytest.mark.parametrize("kind", ["a control character", "a long header", "a path"])
async def test_a_malformed_head_is_told_what_is_wrong_and_the_connection_ends(kind: str) -> None:
    async with receiving(Counting()) as server:
        answer = (await exchange(server, MALFORMED[kind].encode("latin-1"))).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert "Content-Type: application/json" in head
    why = "too long" if "long" in kind else "no HTTP/1.1"
    assert why in json.loads(body)["message"]


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
async def test_nor_at_the_admin_port(sent: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with administering("127.0.0.1", 0, Admin(lambda: ("text/plain", b""))) as admin:
        reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
        writer.write(sent.encode("latin-1"))
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode("latin-1")
        answer += (await asyncio.wait_for(reader.read(), 60)).decode("latin-1")
        writer.close()
    assert re.match(r"HTTP/1\.[01] 4", answer), answer
    assert "GEHEIM" not in answer + caplog.text
    assert "Server: tallymark" in answer
    assert "ython" not in answer
