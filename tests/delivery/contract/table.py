"""What runs came to, kind by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.delivery.contract.runs import KINDS, Result
from tests.support.failures import told


def table(results: Sequence[Result]) -> list[str]:
    """Lines: kind, runs, lost, doubled, failed. A run counts for each of its kinds."""
    runs, lost, doubled, failed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for result in results:
        for kind in {*result.kinds, "all"}:
            runs[kind] += 1
            lost[kind] += result.lost
            doubled[kind] += result.doubled
            failed[kind] += bool(result.problems)
    lines = [f"{'kind':24}{'runs':>8}{'lost':>8}{'doubled':>9}{'failed':>8}"]
    lines += [
        f"{kind:24}{runs[kind]:8}{lost[kind]:8}{doubled[kind]:9}{failed[kind]:8}"
        if runs[kind]
        else f"{kind:24}{'NOT RUN here':>16}"
        for kind in (*KINDS, "all")
    ]
    answers = sum((result.answers for result in results), Counter[str]())
    lines.append("answers: " + ", ".join(f"{count} {name}" for name, count in answers.most_common()))
    points = sum(result.points for result in results)
    memory = [result.resident / 2**20 for result in results]
    return [*lines, f"{points} points; a collector's memory from {min(memory):.0f} to {max(memory):.0f} MiB"]


def failures(results: Sequence[Result]) -> list[str]:
    """Lines: every run that failed, how to repeat it, and what its collectors wrote last."""
    return [
        line
        for result in results
        if result.problems
        for line in told(
            f"seed {result.seed} ({', '.join(result.kinds)})",
            result.problems,
            f"make contract RUNS=1 SEED={result.seed}",
            result.logs,
        )
    ]
