"""The load: HTTP requests of many customers over kept connections, and the driver's own count of the answers.

The count knows nothing of the SDK: it is made of the statuses and bodies that came back. What got no answer is not
counted and not tried again, for nobody could say whether it was served: it ends the load.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from typing import Final

import aiohttp

from tallymark_collector.demo.directory import Customer
from tallymark_collector.demo.proof import BYTES, REQUESTS, TOKENS, Kind

SEED: Final = 20_260_101
CONNECTIONS: Final = 24
TIMEOUT: Final = aiohttp.ClientTimeout(total=30)

QUERIES: Final = ("time", "a", "lost", "money", "interval", "nothing like it", "")
WORDS: Final = ("usage", "becomes", "an", "invoice", "that", "can", "be", "proved", "call", "by", "call")
FILES: Final = ("logo.svg", "terms.txt", "manual.pdf", "photo.jpg", "missing.txt")
FILE_WEIGHTS: Final = (40, 25, 15, 10, 10)


class LoadError(Exception):
    """A request without an answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request before it is made; `route` is the template that its path belongs to."""

    customer: Customer
    method: str
    path: str
    route: str
    body: dict[str, object] | None = None


def calls(count: int, known: Sequence[Customer], seed: int = SEED) -> Iterator[Call]:
    """Requests at random, the same ones every time. The n-th busiest customer makes an n-th as many as the busiest."""
    chance = random.Random(seed)  # noqa: S311 - has to be reproducible, not secret
    busiest_first = chance.sample(known, len(known))
    weights = list(accumulate(1 / rank for rank in range(1, len(known) + 1)))
    for _ in range(count):
        yield _call(chance.choices(busiest_first, cum_weights=weights)[0], chance)


def _call(customer: Customer, chance: random.Random) -> Call:
    match chance.choices(("search", "complete", "download"), (60, 25, 15))[0]:
        case "search":
            return Call(customer, "GET", f"/search?q={chance.choice(QUERIES).replace(' ', '+')}", "/search")
        case "complete":
            prompt = " ".join(chance.choices(WORDS, k=chance.randint(3, 20)))
            asked: dict[str, object] = {"prompt": prompt, "max_tokens": chance.randint(1, 256)}
            return Call(customer, "POST", "/completions", "/completions", asked)
        case _:
            return Call(customer, "GET", f"/files/{chance.choices(FILES, FILE_WEIGHTS)[0]}", "/files/{name}")


async def drive(
    url: str, to_make: Iterable[Call], answered: Callable[[], None], connections: int = CONNECTIONS
) -> dict[Kind, Decimal]:
    """Makes the requests, so many at a time, and returns the count of what was answered. Raises LoadError."""
    counted: Counter[Kind] = Counter()
    waiting = iter(to_make)  # shared: whoever is free takes the next

    async def work(session: aiohttp.ClientSession) -> None:
        for call in waiting:
            await _make(session, call, counted)
            answered()

    async with aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=connections), timeout=TIMEOUT, auto_decompress=False
    ) as session:
        workers = [asyncio.create_task(work(session)) for _ in range(connections)]
        try:
            await asyncio.gather(*workers)
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
            raise LoadError(f"a request got no answer: {error!r}") from error
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return {kind: Decimal(quantity) for kind, quantity in counted.items()}


async def _make(session: aiohttp.ClientSession, call: Call, counted: Counter[Kind]) -> None:
    headers = {"x-api-key": call.customer.api_key}
    async with session.request(call.method, call.path, headers=headers, json=call.body) as response:
        body = await response.read()
    kind = Kind(REQUESTS, call.customer.account, call.method, call.route, response.status)
    counted[kind] += 1
    if response.status == 200 and call.route == "/completions":
        counted[kind._replace(meter=TOKENS)] += json.loads(body)["total_tokens"]
    elif response.status == 200 and call.route == "/files/{name}":
        counted[kind._replace(meter=BYTES)] += len(body)
