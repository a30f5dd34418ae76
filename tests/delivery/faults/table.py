"""What runs came to, kind by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.delivery.faults.harness import Result
from tests.delivery.faults.scenario import KINDS
from tests.support.failures import told


def table(results: Sequence[Result]) -> list[str]:
    """Lines: kind, runs, lost, doubled. A run counts for each of its kinds."""
    runs, lost, doubled, failed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for result in results:
        for kind in (*result.scenario.kinds, "all"):
            runs[kind] += 1
            lost[kind] += result.lost
            doubled[kind] += result.doubled
            failed[kind] += bool(result.problems)
    lines = [f"{'kind':24}{'runs':>8}{'lost':>8}{'doubled':>9}{'failed':>8}"]
    lines += [f"{kind:24}{runs[kind]:8}{lost[kind]:8}{doubled[kind]:9}{failed[kind]:8}" for kind in (*KINDS, "all")]
    seen = sum((result.seen for result in results), Counter[str]())
    lines.append(
        f"answers: {seen['answered']} given, {seen['lost']} lost, {seen['half']} cut in the midst, {seen['slow']} late"
        f"; {seen['away']} connections refused; {seen['disk']} processes without room on the disk"
    )
    real, processes = sum(result.real for result in results), sum(result.processes for result in results)
    return [*lines, f"{processes} processes; {real} runs against the collector with PostgreSQL, the others a fake one"]


def failures(results: Sequence[Result]) -> list[str]:
    """Lines: every run that failed, how to repeat it, and what was written last."""
    return [line for result in results if result.problems for line in _told(result)]


def _told(result: Result) -> list[str]:
    seed, kinds = result.scenario.seed, ", ".join(result.scenario.kinds)
    collector = "the real collector" if result.real else "the fake collector"
    more = " ARGS='--real-share 1'" if result.real else ""
    return told(
        f"seed {seed} ({kinds}) with {collector}, kept in {result.kept}",
        result.problems,
        f"make faults RUNS=1 SEED={seed}{more}",
        result.logs,
    )
