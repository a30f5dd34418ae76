"""Many runs, and what they came to as a table; then once more whatever failed, since a log is read from its end.

python -m tests.delivery.faults --runs 5000 [--seed 1] [--real-share 0.15] [--workers 4]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tallymark_collector.store.engines import connect_string
from tests.delivery.faults.harness import Result, play, scenarios
from tests.delivery.faults.table import failures, table
from tests.support.collector import running


def main() -> int:
    parser = argparse.ArgumentParser(description="breaks recording processes and compares what was recorded and stored")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**8))
    parser.add_argument("--real-share", type=float, default=0.15)
    parser.add_argument("--workers", type=int, default=3)
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    results: list[Result] = []
    folder = Path(tempfile.mkdtemp(prefix="tallymark-faults-"))
    try:
        _play(given, folder, results)
    finally:
        if results:
            print("\n".join([*table(results), *failures(results)]), flush=True)
    if not any(result.problems for result in results):
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    return 1


def _play(given: argparse.Namespace, folder: Path, results: list[Result]) -> None:
    log = folder / "collector.log"
    with ExitStack() as stack:
        is_real = int(given.runs * given.real_share)
        dsn, port = stack.enter_context(real_collector(folder, log)) if is_real else (None, 0)
        planned = scenarios(given.seed, given.runs)
        for at in range(0, given.runs, 100):
            some = planned[at : at + 100]
            split = round(len(some) * given.real_share)
            for part, target in ((some[:split], dsn), (some[split:], None)):
                found = play(part, folder, target, port, given.workers, log if target else None)
                results += found
                for line in failures(found):
                    print(line, flush=True)
            print(f"{len(results)} of {given.runs} runs", file=sys.stderr, flush=True)


@contextmanager
def real_collector(folder: Path, log: Path) -> Iterator[tuple[str, int]]:
    """A collector of its own on an embedded PostgreSQL: its database and its port."""

    with connect_string(f"embedded:{folder / 'pg'}") as dsn, running(dsn, log=log) as collector:
        yield dsn, collector.port


if __name__ == "__main__":
    sys.exit(main())
