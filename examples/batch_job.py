"""Usage without a handler: a job that works through files of several accounts and records what it did for whom.

In one terminal the collector, in another the job, then what it cost whom:

    tallymark serve
    TALLYMARK_ENDPOINT=http://127.0.0.1:4317 python examples/batch_job.py
    tallymark usage --by account,meter
"""

import sys
from decimal import Decimal

import tallymark

FILES = [("acme", "report.pdf", 12), ("acme", "letter.pdf", 1), ("globex", "manual.pdf", 340)]
SECONDS_PER_PAGE = Decimal("0.025")


def convert(name: str, pages: int) -> Decimal:
    """Stands for the work; returns how many seconds of computing it took."""
    print(f"{name}: {pages} pages")
    return pages * SECONDS_PER_PAGE


def main() -> int:
    tallymark.configure(resource={"service.name": "converter"})
    for account, name, pages in FILES:
        with tallymark.identify(account=account):
            seconds = convert(name, pages)
            tallymark.record("pages", pages, unit="{page}", attributes={"kind": "pdf"})
            tallymark.record("compute", seconds, unit="s")
    # At its end the process sends by itself; asking tells whether the collector has it.
    return 0 if tallymark.shutdown() else 1


if __name__ == "__main__":
    sys.exit(main())
