"""Many inputs on three levels, and what they came to."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from tallymark_collector.store.engines import connect_string
from tests.delivery.fuzz.checks import Broken, hold
from tests.delivery.fuzz.corpus import NOW, corpus
from tests.delivery.fuzz.database import Written
from tests.delivery.fuzz.decoder import Decoder
from tests.delivery.fuzz.large import large_input
from tests.delivery.fuzz.metered import FILE, metered_corpus
from tests.delivery.fuzz.mutation import Input, input_of
from tests.delivery.fuzz.server import GROWTH, MiB, Served
from tests.support.collector import running
from tests.support.failures import tail, told
from tests.support.usage import SECOND

LEVELS: Final = ("decoder", "database", "server")
SHARES: Final = {"decoder": 0.96, "database": 0.02, "server": 0.02}
"""Of all inputs: most go where most of them fit into a second."""
BY_FILE: Final = 9
"""Of so many inputs one is of what the file of meters names."""
LARGE: Final = {"decoder": 400, "database": 64, "server": 64}
"""Of so many one is large; the decoder has many more inputs."""
MAX_SHOWN: Final = 20
"""Broken inputs that a level tells of."""


class Problem(NamedTuple):
    """What must not be."""

    where: str
    what: str
    number: int | None
    """Of the input; None where it cannot be said which it was."""


@dataclass
class Result:
    """What one level came to."""

    level: str
    seed: int = 0
    numbers: Sequence[int] = ()
    counts: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    log: list[str] | None = None
    """The end of the collector's log, where there are problems and a collector."""
    notes: list[str] = field(default_factory=list)
    note: Callable[[str], None] = print
    """Is told of the first problems as they are found."""

    def told(self, given: Input, error: Exception) -> None:
        """Notes an input that broke something, with all that is needed to see it again."""
        self.broke(f"input {given.number} ({given.signal}, {given.damage})", error, given.number)

    def broke(self, where: str, error: Exception, number: int | None = None) -> None:
        """Notes what must not be; of an input, or of all of them."""
        self.counts["broken"] += 1
        if len(self.problems) < MAX_SHOWN:
            self.problems.append(Problem(f"{self.level}, {where}", f"{type(error).__name__}: {error}", number))
            self.note(f"{self.problems[-1].where}: {self.problems[-1].what}"[:3000])

    def again(self, number: int | None) -> str:
        """The command that sends an input again, or all of them."""
        first, count = (self.numbers[0], len(self.numbers)) if number is None else (number, 1)
        return f"make fuzz INPUTS={count} SEED={self.seed} ARGS='--level {self.level} --first {first}'"


def play(level: str, folder: Path, seed: int, numbers: Sequence[int], note: Callable[[str], None]) -> Result:
    """The inputs of these numbers on one level; `folder` is for a database."""
    result = Result(level, seed, numbers, note=note)
    # A server has the machine's clock; elsewhere the same number is the same input for ever.
    now_ns = time.time_ns() // SECOND * SECOND if level == "server" else NOW
    inputs = _inputs(seed, numbers, now_ns, result, note)
    if level == "decoder":
        _decode(inputs, result)
    elif level == "database":
        with connect_string(f"embedded:{folder / 'pg'}") as dsn:
            asyncio.run(_write(dsn, inputs, result))
    else:
        log, file = folder / "collector.log", folder / "meters.yaml"
        file.write_text(FILE)
        with (
            connect_string(f"embedded:{folder / 'served'}") as dsn,
            running(dsn, "--meters", str(file), log=log) as collector,
        ):
            served = Served(collector, seed, now_ns)
            with _closing(served):
                _serve(served, inputs, result)
        if result.problems:
            result.log = tail(log)
    return result


def _inputs(
    seed: int, numbers: Sequence[int], now_ns: int, result: Result, note: Callable[[str], None]
) -> Iterator[Input]:
    plain, metered = corpus(now_ns), metered_corpus(now_ns)
    for done, number in enumerate(numbers):
        if done and done % 10_000 == 0:
            note(f"{result.level}: {done} of {len(numbers)} inputs, {result.counts['broken']} broken")
        if number % LARGE[result.level] == LARGE[result.level] // 2:
            given = large_input(seed, number, now_ns)
            result.damage["large"] += 1
        else:
            by_file = number % BY_FILE == 1
            given = input_of(metered if by_file else plain, seed, number, by_file)
            result.damage.update(given.damage.split("+"))
        yield given


def _decode(inputs: Iterator[Input], result: Result) -> None:
    decoder = Decoder()
    resident: list[int] = []
    for done, given in enumerate(inputs):
        if done % 1000 == 999:
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
        try:
            decoder.take(given)
        except Exception as error:
            result.told(given, error)
    result.counts += decoder.all_counts
    if len(resident) >= 3:
        early, late = resident[len(resident) // 3], resident[-1]
        result.notes.append(f"memory {early / MiB:.0f} MiB after a third and {late / MiB:.0f} MiB at the end")
        try:
            hold(late - early <= GROWTH, "memory grows", result.notes[-1])
        except Broken as error:
            result.broke("at the end", error)


async def _write(dsn: str, inputs: Iterator[Input], result: Result) -> None:
    written = Written(dsn)
    await written.open()
    try:
        for given in inputs:
            try:
                await written.take(given)
            except Exception as error:
                result.told(given, error)
                written.empty()
        written.settle()
    finally:
        await written.close()
    result.counts += written.counts


def _serve(served: Served, inputs: Iterator[Input], result: Result) -> None:
    served.probe()
    for given in inputs:
        try:
            served.take(given)
        except Exception as error:
            result.told(given, error)
            if served.collector.process is None or served.collector.process.poll() is not None:
                return
    result.counts += served.counts
    try:
        served.probe()
        result.notes.append(served.check_flat())
    except Exception as error:
        result.broke("at the end", error)


@contextmanager
def _closing(served: Served) -> Iterator[None]:
    try:
        yield
    finally:
        served.close()


def table(results: Sequence[Result]) -> list[str]:
    """Lines: level, inputs, what became of them."""
    names = ("inputs", "accepted", "refused", "quarantined", "duplicates", "broken")
    lines = ["".join([f"{'level':10}", *(f"{name:>13}" for name in names)])]
    for result in results:
        lines.append("".join([f"{result.level:10}", *(f"{result.counts[name]:13}" for name in names)]))
    for result in results:
        more = [f"{count} {name}" for name, count in sorted(result.counts.items()) if name not in names]
        lines.append(f"{result.level}: " + "; ".join([*more, *result.notes]))
    damage = sum((result.damage for result in results), Counter[str]())
    return [*lines, "damage: " + ", ".join(f"{count} {name}" for name, count in damage.most_common())]


def failures(results: Sequence[Result]) -> list[str]:
    """Lines: every input that broke something, how to send it again, and what the collector wrote last."""
    lines = []
    for result in results:
        for place, problem in enumerate(result.problems, 1):
            is_last = place == len(result.problems)
            logs = {"the collector's log": result.log} if is_last and result.log is not None else {}
            lines += told(problem.where, [problem.what], result.again(problem.number), logs)
    return lines
