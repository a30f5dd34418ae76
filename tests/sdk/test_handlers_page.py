"""The examples of docs/handlers.md do what the page says."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tallymark import identify
from tallymark.assembly import Runtime
from tallymark.testing import capture_usage

PAGE = Path(__file__).parents[2] / "docs" / "handlers.md"


def test_the_page(fresh: Runtime) -> None:
    page: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), page)

    async def asynchronous() -> None:
        await page["asynchronous"](1)
        await page["View"]().get(1)
        assert [item async for item in page["stream"](2)] == [0, 1]

    identify(account="acme")
    with capture_usage() as usage:
        page["plain"](1)
        asyncio.run(asynchronous())
        page["search_all"](["a", "b"])
        page["search"]("a")
        page["insert"]([1, 2, 3])
        page["compute"]()
        list(page["lines"](4))
        page["work"](3)
        page["table"](5)
        page["complete"]("prompt")
        page["job"](False)
        with pytest.raises(ValueError):  # noqa: PT011 - the page's own
            page["job"](True)
    totals = {
        meter: usage.total(meter)
        for meter in ("calls", "streams", "searches", "hits", "rows", "lines", "credits", "cells", "llm.tokens", "jobs")
    }
    assert totals == {
        "calls": 3,
        "streams": 1,
        "searches": 1,
        "hits": 2,
        "rows": 3,
        "lines": 4,
        "credits": 6,
        "cells": 50,
        "llm.tokens": 120,
        "jobs": 1,
    }
    assert usage.total("compute") > 0
    assert {u.attributes["gen_ai.token.type"]: u.quantity for u in usage if u.meter == "llm.tokens"} == {
        "input": 70,
        "output": 20,
        "cache_read": 30,
    }
    assert (usage.not_billed(), usage.refused()) == ({"jobs": 1}, {})
