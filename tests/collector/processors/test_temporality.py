"""Totals in any order become increases whose sums are what the producer counted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tallymark_collector.model import Attributes, Point, Reason, Temporality
from tallymark_collector.processors.temporality import Increases, Sample, increases
from tests.support.usage import stream

OF = stream(temporality=Temporality.CUMULATIVE)
START = 1000


def totals(*pairs: tuple[int, int], start: int = START) -> list[Point]:
    return [Point(OF, start, time, Decimal(value)) for time, value in pairs]


def billed(result: Increases) -> list[tuple[int, int, Decimal]]:
    return [(p.start_ns, p.time_ns, p.value) for p in result.points]


def test_in_order() -> None:
    result = increases(START, [], totals((1010, 3), (1020, 3), (1030, 8)))
    assert billed(result) == [(1000, 1010, 3), (1020, 1030, 5)]
    assert result.samples == [Sample(1010, Decimal(3)), Sample(1020, Decimal(3)), Sample(1030, Decimal(8))]


def test_increases_of_many_digits_are_exact() -> None:
    small, late, large = Decimal("1.2345678901234567E-7"), Decimal("0.1234567890123456"), Decimal(2**63 - 1)
    result = increases(START, [], [Point(OF, START, 1010, small), Point(OF, START, 1030, large)])
    result.points += increases(START, result.samples, [Point(OF, START, 1020, late)]).points
    assert sum(Fraction(point.value) for point in result.points) == 2**63 - 1
    assert sum(Fraction(point.value) for point in result.points if point.time_ns <= 1020) == Fraction(late)


def test_a_late_total_splits_the_later_increase_and_leaves_the_sum() -> None:
    known = [Sample(1010, Decimal(3)), Sample(1030, Decimal(8))]
    assert billed(increases(START, known, totals((1020, 7)))) == [(1010, 1020, 4), (1020, 1030, -4)]


def test_a_late_first_total_splits_the_first_increase() -> None:
    assert billed(increases(START, [Sample(1030, Decimal(8))], totals((1020, 7)))) == [
        (1000, 1020, 7),
        (1020, 1030, -7),
    ]


def test_a_start_equal_to_the_time_is_a_base_that_counts_nothing() -> None:
    assert billed(increases(START, [], totals((START, 50), (1010, 53)))) == [(1000, 1010, 3)]


def test_a_start_equal_to_the_time_counts_where_the_clock_has_milliseconds() -> None:
    """What a job on Node records and exports in one millisecond."""
    for language, first in (("nodejs", 50), ("webjs", 50), ("go", 0), ("python", 0)):
        of = replace(OF, resource=Attributes.of({"service.name": "shop", "telemetry.sdk.language": language}))
        points = [Point(of, START, time, Decimal(value)) for time, value in ((START, 50), (1010, 53))]
        expected = [(1000, 1000, 50), (1000, 1010, 3)] if first else [(1000, 1010, 3)]
        assert billed(increases(START, [], points)) == expected
        late = increases(START, [Sample(1010, Decimal(53))], points[:1])
        assert sum(p.value for p in late.points) == first - 50
        unknown = [Point(of, 0, 1000, Decimal(50))]
        assert billed(increases(0, [], unknown)) == []


def test_a_base_that_comes_late_takes_back_what_was_counted_from_zero() -> None:
    late = increases(START, [Sample(1010, Decimal(53))], totals((START, 50)))
    assert billed(late) == [(1000, 1010, -50)]


def test_an_unknown_start_counts_from_the_first_total_and_reads_a_fall_as_a_reset() -> None:
    result = increases(0, [], totals((10, 100), (20, 130), (30, 5), (40, 6), start=0))
    assert billed(result) == [(10, 20, 30), (20, 30, 5), (30, 40, 1)]


def test_a_fall_inside_an_epoch_is_refused_on_either_side() -> None:
    known = [Sample(1010, Decimal(5)), Sample(1030, Decimal(8))]
    for wrong in ((1020, 4), (1020, 9), (1040, 7)):
        result = increases(START, known, totals(wrong))
        assert [refusal.reason for _, refusal in result.refused] == [Reason.VALUE_DECREASED]
        assert not result.points
        assert not result.samples


def test_the_same_time_again() -> None:
    known = [Sample(1010, Decimal(5))]
    assert increases(START, known, totals((1010, 5))).duplicates == 1
    result = increases(START, known, totals((1010, 6)))
    assert [refusal.reason for _, refusal in result.refused] == [Reason.VALUE_CONFLICT]


@st.composite
def counters(draw: st.DrawFn) -> tuple[dict[int, int], list[list[int]], bool]:
    """A counter's true totals by time; the order in which batches of them arrive; whether its start is known."""
    steps = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), min_size=1, max_size=15))
    truth, time, value = {}, START, 0
    for gap, growth in steps:
        time, value = time + gap, value + growth
        truth[time] = value
    order = draw(st.permutations(list(truth)))
    repeats = draw(st.lists(st.sampled_from(order), max_size=5))
    sent = [*order, *repeats]
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=4)))
    batches = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    return truth, batches, draw(st.booleans())


@given(counters())
def test_any_order_and_batching_gives_the_counters_own_growth(
    counter: tuple[dict[int, int], list[list[int]], bool],
) -> None:
    truth, batches, known_start = counter
    start = START if known_start else 0
    samples: list[Sample] = []
    by_end: dict[int, Fraction] = defaultdict(Fraction)
    arrived: set[int] = set()
    for batch in batches:
        result = increases(start, samples, totals(*((time, truth[time]) for time in batch), start=start))
        assert not result.refused
        samples = sorted([*samples, *result.samples])
        arrived.update(batch)
        for _, end, value in billed(result):
            by_end[end] += Fraction(value)
        # After every batch, each sampled interval has the growth that the counter had over it.
        seen = sorted(arrived)
        for before, after in zip([None, *seen], seen, strict=False):
            base = truth[before] if before is not None else (0 if known_start else truth[after])
            assert by_end[after] == truth[after] - base
    assert sum(by_end.values()) == truth[max(arrived)] - (0 if known_start else truth[min(arrived)])
