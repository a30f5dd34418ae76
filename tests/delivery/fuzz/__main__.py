"""Many malformed inputs, and what became of them as a table; then once more whatever was wrong.

python -m tests.delivery.fuzz --inputs 1000000 [--seed 1] [--level decoder] [--first 17]

`--level` and `--first` with `--inputs 1` look at one input again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.delivery.fuzz.runs import LEVELS, SHARES, Result, failures, play, table


def main() -> int:
    parser = argparse.ArgumentParser(description="sends damaged requests to decoder, database and server")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**8))
    parser.add_argument("--level", choices=LEVELS, help="all inputs on this one alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    shares = {given.level: 1.0} if given.level else SHARES
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="tallymark-fuzz-") as folder:
        for level, share in shares.items():
            numbers = range(given.first, given.first + round(given.inputs * share))
            results.append(play(level, Path(folder), given.seed, numbers, _note))
    print("\n".join([*table(results), *failures(results)]))
    return int(any(result.counts["broken"] for result in results))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
