"""The collector as one process: its loops end when they are told to."""

from __future__ import annotations

import asyncio

from tallymark_collector.application import ended


async def _deaf(times: int, heard: list[int]) -> None:
    """A loop as psycopg's pool makes one of it: a cancellation meets the end of what is waited for, and is lost."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            heard.append(1)
            if len(heard) > times:
                raise


def test_a_loop_that_missed_its_cancellation_is_cancelled_again() -> None:
    async def run() -> list[int]:
        heard: list[int] = []
        task = asyncio.create_task(_deaf(2, heard))
        await asyncio.sleep(0)
        await asyncio.wait_for(ended([task], patience=0.01), 60)
        assert task.cancelled()
        return heard

    assert len(asyncio.run(run())) == 3


def test_what_a_loop_died_of_is_not_raised_again() -> None:
    async def died() -> None:
        raise OSError("for another to tell")

    async def run() -> None:
        task = asyncio.create_task(died())
        await asyncio.wait([task])
        await ended([task])

    asyncio.run(run())
    asyncio.run(ended([]))
