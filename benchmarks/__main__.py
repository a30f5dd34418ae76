"""`python -m benchmarks [decorator] [ingest] [reads]`: the named benchmarks, or all, as tables."""

from __future__ import annotations

import sys

from rich.console import Console

from benchmarks import decorator, ingest, reads

BENCHMARKS = {"decorator": decorator.tables, "ingest": ingest.tables, "reads": reads.tables}


def main() -> int:
    """Runs and prints. Returns the exit status."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in wanted if name not in BENCHMARKS]:
        print(f"no benchmark named {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    console = Console(width=110)
    for name in wanted:
        for table in BENCHMARKS[name]():
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
