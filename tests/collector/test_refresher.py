"""The loop that refreshes hours leaves the database to who writes, for a while."""

from __future__ import annotations

import asyncio

import pytest

from tallymark_collector.aggregates.refresher import MAX_POSTPONED, keep_refreshed


class Clocked(asyncio.SelectorEventLoop):
    """A loop whose time is moved on by whoever waits: no test here takes any."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Store:
    """Notes when it was asked; a refresh takes a tenth of a second."""

    def __init__(self, made: int) -> None:
        self.asked: list[float] = []
        self._made = made

    async def refresh(self) -> int:
        self.asked.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        return self._made


def pauses(made: int, busy: float, seconds: float) -> list[float]:
    """Between refreshes that begin within so many seconds; `busy`: the share of the time that is spent on writing."""
    loop = Clocked()
    store = Store(made)

    async def run() -> None:
        task = asyncio.ensure_future(keep_refreshed(store, 1.0, lambda: loop.time() * busy))
        await asyncio.sleep(seconds)
        task.cancel()

    loop.run_until_complete(run())
    loop.close()
    return [after - before for before, after in zip(store.asked, store.asked[1:], strict=False)]


@pytest.mark.parametrize(("made", "expected"), [(0, 1.1), (7, 0.2)])
@pytest.mark.parametrize("busy", [0.0, 0.3])
def test_a_writer_that_is_not_busy_changes_nothing(made: int, busy: float, expected: float) -> None:
    found = pauses(made, busy, 20)
    assert found == pytest.approx([expected] * len(found))
    assert len(found) >= 10


@pytest.mark.parametrize("made", [0, 7])
def test_a_busy_writer_puts_refreshes_off_for_a_while_and_no_longer(made: int) -> None:
    found = pauses(made, 0.9, 60)
    assert len(found) >= 8
    assert all(MAX_POSTPONED < pause < MAX_POSTPONED + 1.2 for pause in found)
