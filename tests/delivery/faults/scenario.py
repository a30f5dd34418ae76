"""One run, written down before it begins: a function of its seed, but for how the machine's scheduler plays it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

KINDS: Final = (
    "SIGKILL",
    "SIGTERM",
    "fork",
    "restart",
    "several at once",
    "collector away",
    "acknowledgement lost",
    "slow answers",
    "half-written answers",
    "full outbox",
    "full disk",
    "clock stepped",
)
"""What can happen. Every run has one of them for certain, in turn, and any of the others by chance."""

INTERVAL_S: Final = 0.03
TIMEOUT_S: Final = 0.25
SLOW_S: Final = 0.4
"""Longer than a client waits."""

OUTBOX_BYTES: Final = 6_000
TINY_DISK_BYTES: Final = 8 * 2**20
"""Room for every process of a run, until it is filled."""

MAX_CHANCE: Final = 0.6
"""Of an answer to go wrong in one way or another: where none got through, a full disk's usage could never leave it."""

STEPS_S: Final = (-7200.0, -61.0, -5.0, -0.5, 0.5, 30.0, 120.0)
MAX_AHEAD_S: Final = 300.0
"""A collector tolerates a producer's clock that is so far ahead, and some."""


@dataclass
class Life:
    """Processes that start together, and how they end."""

    orders: list[dict[str, Any]]
    kills: list[tuple[float, int, str]] = field(default_factory=list)
    """(seconds since they began, region, signal)"""
    away: bool = False
    filled: tuple[float, float] | None = None
    """Seconds after which a tiny disk is filled, and after which there is room again."""


@dataclass
class Scenario:
    """A run's processes and faults. `regions` of the tally are used."""

    seed: int
    kinds: tuple[str, ...]
    chances: dict[str, float]
    lives: list[Life]
    regions: int
    tiny_disk: bool


def scenario(seed: int, certain: str) -> Scenario:
    """What happens in the run of this seed."""
    rng = random.Random(seed)
    kinds = {certain, *(kind for kind in KINDS if rng.random() < 0.25)}
    chances = {
        fate: rng.uniform(0.1, 0.5)
        for kind, fate in (
            ("acknowledgement lost", "lost"),
            ("half-written answers", "half"),
            ("slow answers", "slow"),
        )
        if kind in kinds
    }
    share = sum(chances.values())
    if share > MAX_CHANCE:
        chances = {fate: chance * MAX_CHANCE / share for fate, chance in chances.items()}
    disk = "full disk" in kinds
    tiny = disk and rng.random() < 0.6
    regions = 0
    lives = []
    count = 2 + rng.randrange(2) if "restart" in kinds or disk else 1
    for number in range(count):
        # What a full disk keeps in memory is lost with its process, as the log says: that one must not be killed.
        filling = disk and number == count - 1
        orders, kills = [], []
        for _ in range(rng.randint(2, 4) if "several at once" in kinds else 1):
            region, regions = regions, regions + 1
            lasts = rng.uniform(0.03, 0.25)
            plan: list[tuple[float, str, Any]] = []
            if "clock stepped" in kinds:
                ahead = 0.0
                for _ in range(rng.randint(1, 4)):
                    step = rng.choice([step for step in STEPS_S if ahead + step <= MAX_AHEAD_S])
                    ahead += step
                    plan.append((rng.uniform(0, lasts), "clock", step))
            if "fork" in kinds:
                for _ in range(rng.randint(1, 2)):
                    end = "delivered" if filling else rng.choice(["exit", "shutdown", "stay"])
                    child = {"region": regions, "lasts": rng.uniform(0.01, 0.15), "end": end}
                    plan.append((rng.uniform(0, lasts), "fork", child))
                    if not filling and rng.random() < 0.5:
                        kills.append((rng.uniform(0.02, 0.3), regions, "SIGKILL"))
                    regions += 1
            if filling and not tiny:
                plan.append((rng.uniform(0, lasts), "file_bytes", rng.choice([1, 40_000, 65_536, 100_000])))
                if rng.random() < 0.5:
                    plan.append((lasts, "file_bytes", 0))
            signals = [name for name in ("SIGKILL", "SIGTERM") if name in kinds]
            end = "delivered" if filling else rng.choice(["exit", "shutdown", "stay"])
            order = {
                "seed": rng.randrange(10**9),
                "region": region,
                "lasts": lasts,
                "end": end,
                "plan": sorted(plan, key=lambda step: step[0]),
                "stop_on_term": "SIGTERM" in kinds and rng.random() < 0.5,
                "outbox_bytes": OUTBOX_BYTES if "full outbox" in kinds else 64 * 2**20,
                "file_bytes": 0,
                "interval": INTERVAL_S,
                "timeout": TIMEOUT_S,
                "last": False,
            }
            orders.append(order)
            if not filling and (signals or end == "stay"):
                kills.append((rng.uniform(0, 0.3), region, rng.choice(signals or ["SIGKILL"])))
        away = not filling and ("collector away" in kinds or "full outbox" in kinds) and rng.random() < 0.7
        filled = (rng.uniform(0, 0.1), rng.uniform(0.1, 0.4)) if filling and tiny else None
        lives.append(Life(orders, sorted(kills), away, filled))
    if "collector away" in kinds and not disk:
        lives[rng.randrange(len(lives))].away = True
    return Scenario(seed, tuple(kind for kind in KINDS if kind in kinds), chances, lives, regions, tiny)


LAST: Final[dict[str, Any]] = {
    "seed": 0,
    "region": 0,
    "lasts": 0,
    "end": "",
    "plan": [],
    "stop_on_term": False,
    "outbox_bytes": 64 * 2**20,
    "file_bytes": 0,
    "interval": INTERVAL_S,
    "timeout": 5.0,
    "last": True,
}
"""The process that comes last: it finds what all the others left, and nothing fails any more."""
