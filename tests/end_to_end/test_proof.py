"""The comparison that the demo's last line stands on: whatever differs shows, also where sums agree."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tallymark_collector.demo.proof import REQUESTS, TOKENS, Counts, Kind, Proof, compare

SEARCH = Kind(REQUESTS, "acme", "GET", "/search", 200)
COUNTED = {
    SEARCH: Decimal(5),
    SEARCH._replace(account="globex"): Decimal(3),
    SEARCH._replace(status=400): Decimal(1),
    SEARCH._replace(meter=TOKENS): Decimal(700),
}


def changed(kind: Kind, by: int) -> Counts:
    return {**COUNTED, kind: COUNTED.get(kind, Decimal(0)) + by}


def test_equal_counts_hold() -> None:
    proofs = compare(COUNTED, COUNTED)
    assert set(proofs) == {REQUESTS, TOKENS}
    assert all(proof.holds for proof in proofs.values())
    assert proofs[REQUESTS].line() == "sent=9 billed=9 lost=0 duplicated=0"
    assert proofs[TOKENS].to_document() == {"sent": 700, "billed": 700, "lost": 0, "duplicated": 0}


@pytest.mark.parametrize(
    ("billed", "line"),
    [
        pytest.param(changed(SEARCH, -1), "sent=9 billed=8 lost=1 duplicated=0", id="lost"),
        pytest.param(changed(SEARCH, 2), "sent=9 billed=11 lost=0 duplicated=2", id="duplicated"),
        pytest.param(changed(SEARCH._replace(account="new"), 1), "sent=9 billed=10 lost=0 duplicated=1", id="unknown"),
        pytest.param({}, "sent=9 billed=0 lost=9 duplicated=0", id="nothing billed"),
        pytest.param(
            {**changed(SEARCH, 1), SEARCH._replace(status=400): Decimal(0)},
            "sent=9 billed=9 lost=1 duplicated=1",
            id="billed as another status",
        ),
        pytest.param(
            {**changed(SEARCH, -2), SEARCH._replace(account="globex"): Decimal(5)},
            "sent=9 billed=9 lost=2 duplicated=2",
            id="billed to another account",
        ),
    ],
)
def test_a_difference_in_any_kind_of_call_shows(billed: Counts, line: str) -> None:
    proof = compare(COUNTED, billed)[REQUESTS]
    assert proof.line() == line
    assert not proof.holds


def test_meters_are_told_apart() -> None:
    proofs = compare(COUNTED, changed(SEARCH._replace(meter=TOKENS), -700))
    assert proofs[REQUESTS].holds
    assert proofs[TOKENS] == Proof(Decimal(700), Decimal(0), Decimal(700), Decimal(0))


def test_nothing_at_all_is_a_line_too() -> None:
    assert compare({}, {})[REQUESTS].line() == "sent=0 billed=0 lost=0 duplicated=0"
