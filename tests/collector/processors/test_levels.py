"""Levels of one source: at every instant one account has what the source stands at, whatever came when.

The oracle puts each level in its place in time when it comes and says whose it is; what is stored is read as the views
do, stream by stream.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_collector.billing.fields import MAX_STALE
from tallymark_collector.model import Point, Source, Stream, Temporality, fingerprint
from tallymark_collector.processors.levels import LONGEST_HELD, Told, succeed
from tests.support.usage import stream

SOURCE = fingerprint("a source")
FACTORS = (Decimal(1), Decimal(10), Decimal("0.001"))
ACCOUNTS = ("acme", "globex", "initech")


@dataclass(frozen=True)
class Came:
    """A level that comes, in the order of the list."""

    at: int
    """In nanoseconds: some share a microsecond, which one account has."""
    measured: int
    account: str
    region: str
    factor: Decimal
    decided: bool

    def point(self) -> Point:
        billed = stream(self.account, "seats", "one", Temporality.LEVEL, region=self.region)
        # Its identity knows the account, and no dimension.
        identity = fingerprint(self.account)
        source = Source(SOURCE, self.factor, decided=self.decided)
        return Point(replace(billed, id=identity, source=source), 0, self.at, self.measured * self.factor)


TIMES = st.one_of(st.integers(1, 12).map(lambda n: n * 1_000_000), st.integers(3_000_000, 3_002_500))
CAME = st.builds(
    Came,
    TIMES,
    st.integers(-3, 9),
    st.sampled_from(ACCOUNTS),
    st.sampled_from(("eu", "us")),
    st.sampled_from(FACTORS),
    st.booleans(),
)


@dataclass
class Stored:
    """Rows as the database has them: by account and stream or series, then by time in microseconds, the greatest part
    last."""

    across: str
    rows: dict[tuple[str, object], dict[int, dict[int, Decimal]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )

    def add(self, billed: Stream, time_ns: int, part: int, value: Decimal) -> None:
        holder = billed.id if self.across == "sum" else billed.series.id
        self.rows[billed.series.account, holder][time_ns // 1000].setdefault(part, value)

    def stands(self, account: str, now: int) -> Decimal:
        """In microseconds."""
        total = Decimal(0)
        for (whose, _), rows in self.rows.items():
            last = max((time for time in rows if time <= now), default=None)
            if whose == account and last is not None:
                total += rows[last][max(rows[last])]
        return total


def test_a_level_that_holds_no_more_needs_no_end() -> None:
    assert LONGEST_HELD == MAX_STALE * 10**9
    timeline: list[Told] = []
    first, much_later, between = (
        Came(at, 1, account, "eu", Decimal(1), decided=False).point()
        for at, account in ((1000, "acme"), (1000 + LONGEST_HELD, "globex"), (2000, "initech"))
    )
    assert succeed(timeline, [(0, first)]).ends == []
    assert succeed(timeline, [(0, much_later)]).ends == []
    found = succeed(timeline, [(0, between)])
    assert found.told[0].stream is first.stream
    assert [(end.time_ns, end.stream.series.account) for end in found.ends] == [(1000 + LONGEST_HELD, "acme")]


@pytest.mark.parametrize("across", ["sum", "latest"])
@settings(max_examples=200, deadline=None)
@given(batches=st.lists(st.lists(CAME, max_size=6), max_size=6))
def test_one_account_has_what_a_source_stands_at(across: str, batches: list[list[Came]]) -> None:
    stored = Stored(across)
    if across == "latest":
        batches = [[replace(came, decided=False) for came in batch] for batch in batches]
    timeline: list[Told] = []
    known: dict[int, tuple[int, str, Decimal]] = {}
    """The oracle's: by time, what was measured, whose it is, and by which factor."""
    for batch in batches:
        found = succeed(timeline, [(place, came.point()) for place, came in enumerate(batch)])
        for told in found.told.values():
            stored.add(told.stream, told.time_ns, told.time_ns % 1000, told.value)
        for end in found.ends:
            stored.add(end.stream, end.time_ns, -1 - end.time_ns % 1000, Decimal(0))
        for place, came in sorted(enumerate(batch), key=lambda one: one[1].at):
            if came.at in known:
                assert found.there[place] == known[came.at][0] * came.factor
                continue
            assert place in found.told
            later = [at for at in known if at > came.at]
            earlier = [at for at in known if at < came.at]
            whose, factor = came.account, came.factor
            if beside := [at for at in known if at // 1000 == came.at // 1000]:
                _, whose, factor = known[beside[0]]
            elif later and not came.decided:
                _, whose, factor = known[max(earlier) if earlier else min(later)]
            known[came.at] = (came.measured, whose, factor)
        for now in (*(n * 1000 + 500 for n in range(13)), *range(2999, 3004)):
            last = max((at for at in known if at // 1000 <= now), default=None)
            for account in ACCOUNTS:
                level, whose, factor = (0, "", Decimal(1)) if last is None else known[last]
                expected = level * factor if whose == account else 0
                assert stored.stands(account, now) == expected, (account, now)
