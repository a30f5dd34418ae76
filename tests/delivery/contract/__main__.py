"""Many runs, and what they came to as a table.

python -m tests.delivery.contract --runs 5000 [--seed 1]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.delivery.contract.runs import Result, play, worlds
from tests.delivery.contract.table import table


def main() -> int:
    parser = argparse.ArgumentParser(
        description="breaks collectors and databases, and compares what was sent and stored"
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**8))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="tallymark-contract-") as folder, worlds(Path(folder)) as world:
        for seed in range(given.seed, given.seed + given.runs):
            results.append(play(world, seed))
            if results[-1].problems:
                print(results[-1], flush=True)
            if len(results) % 50 == 0:
                print(f"{len(results)} of {given.runs} runs", file=sys.stderr, flush=True)
    print("\n".join(table(results)))
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
