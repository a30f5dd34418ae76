"""`python -m benchmarks [NAME…]`: those of the benchmarks below, or all, as tables."""

from __future__ import annotations

import subprocess
import sys

from rich.console import Console

from benchmarks import beside, decorator, export, ingest, processes, reads, soak

BENCHMARKS = {
    "decorator": decorator.tables,
    "beside": beside.tables,
    "export": export.tables,
    "ingest": ingest.tables,
    "processes": processes.tables,
    "reads": reads.tables,
    "soak": soak.tables,
}


def main() -> int:
    """Runs and prints. Returns the exit status."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in wanted if name not in BENCHMARKS]:
        print(f"no benchmark named {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if len(wanted) > 1:  # each in a process of its own: what one leaves in memory is not another's to collect
        return max(
            subprocess.run([sys.executable, "-m", "benchmarks", name], check=False).returncode for name in wanted
        )
    console = Console(width=110)
    for table in BENCHMARKS[wanted[0]]():
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
