"""What repeats is remembered, within both limits."""

from __future__ import annotations

from tallymark_collector.metering.memory import Memory
from tallymark_collector.processors.streams import DECODED, REMEMBERED


def test_it_forgets_at_either_limit() -> None:
    few, small = Memory(3, 1 << 30), Memory(1000, 10 * (REMEMBERED + 100 * DECODED))
    for i in range(50):
        few["key", i] = i
        small["key", b"x" * 97, i] = i
        assert (few["key", i], small["key", b"x" * 97, i]) == (i, i)
        assert few.size <= 3
        assert small.size <= 10
        assert small.weight == small.size * (REMEMBERED + 100 * DECODED)


def test_one_larger_than_the_limit_is_alone() -> None:
    memory = Memory(1000, 1 << 20)
    memory["a",] = 1
    memory[b"x" * (1 << 20),] = 2
    assert (memory.size, (b"x" * (1 << 20),) in memory) == (1, True)
    memory["b",] = 3
    assert (memory.size, memory["b",]) == (1, 3)
