"""Finalised invoices: a period's bill that stays as it is, whatever comes later and whatever is dropped.

    finalizing   what is done: an invoice of a period that has ended, a correction of one that is there
    checks       what keeps a period from being finalised, and what of it somebody may knowingly accept
    basis        what a document stands on: sums by points, hours and days, and a digest over the points
    corrections  the difference between two bills of a period, as lines; pure
    later        what is stored now beside what a document bills
    documents    the documents themselves, as they are kept

Everything that decides about a document is read in one snapshot, in the transaction that adds it. Documents are only
ever added; a correction is one of its own, the difference from all before it.
"""

from tallymark_collector.invoicing.checks import ACCEPTABLE, Obstacle, RefusedError
from tallymark_collector.invoicing.documents import Document, chain
from tallymark_collector.invoicing.finalizing import GRACE, Asked, Outcome, correct, finalize
from tallymark_collector.invoicing.later import Later, later, unchanged

__all__ = [
    "ACCEPTABLE",
    "GRACE",
    "Asked",
    "Document",
    "Later",
    "Obstacle",
    "Outcome",
    "RefusedError",
    "chain",
    "correct",
    "finalize",
    "later",
    "unchanged",
]
