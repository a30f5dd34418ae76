"""Many runs, and what they came to as a table; then once more whatever failed, since a log is read from its end.

python -m tests.delivery.contract --runs 5000 [--seed 1]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.delivery.contract.runs import RUNS_OF_A_WORLD, Result, play, worlds
from tests.delivery.contract.table import failures, table


def main() -> int:
    parser = argparse.ArgumentParser(
        description="breaks collectors and databases, and compares what was sent and stored"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**8))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    results: list[Result] = []
    try:
        _play(given.seed, given.runs, results)
    finally:
        if results:
            print("\n".join([*table(results), *failures(results)]), flush=True)
    return int(any(result.problems for result in results))


def _play(seed: int, runs: int, results: list[Result]) -> None:
    end = seed + runs
    for first in range(seed, end, RUNS_OF_A_WORLD):
        with tempfile.TemporaryDirectory(prefix="tallymark-contract-") as folder, worlds(Path(folder)) as world:
            for number in range(first, min(first + RUNS_OF_A_WORLD, end)):
                results.append(play(world, number))
                if results[-1].problems:
                    print("\n".join(failures(results[-1:])), flush=True)
                if len(results) % 50 == 0:
                    print(f"{len(results)} of {runs} runs", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
