import threading
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from tallymark.meters import Meter
from tallymark.quantities import exact, shortest
from tallymark.recorder import Recorder, Stream

METER = Meter("m", "1")


def stream(account: str = "acme", *dimensions: tuple[str, str, str]) -> Stream:
    return (METER, account, None, dimensions)


recordings = st.one_of(
    st.integers(0, 2**63 - 1),
    st.floats(0, 1e12, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-60),
    st.decimals(0, 10**15, places=24),
)
steps = st.lists(st.tuples(st.sampled_from("abc"), recordings) | st.just("cut"), max_size=60)


@given(steps, st.data())
def test_wire_values_over_any_cuts_are_the_exact_total(script: list[object], data: st.DataObject) -> None:
    recorder = Recorder(100)
    want: dict[str, Decimal] = {}
    got: dict[str, Decimal] = {}
    last = 100

    def cut() -> None:
        nonlocal last
        taken = recorder.cut(data.draw(st.integers(0, 1000)))  # a clock that jumps about
        assert taken.start_ns == last
        assert taken.time_ns > last
        last = taken.time_ns
        assert len({s for s, _ in taken.values}) == len(taken.values)
        for (_, account, _, _), value in taken.values:
            assert value > 0
            assert account is not None
            sent = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
            with_exactness(got, account, sent)

    for step in script:
        if step == "cut":
            cut()
        else:
            account, amount = step  # type: ignore[misc]
            recorder.add(stream(account), exact(amount))
            with_exactness(want, account, Decimal(repr(amount)) if isinstance(amount, float) else Decimal(amount))
    while recorder:
        cut()
    assert got == {account: total for account, total in want.items() if total}


def with_exactness(totals: dict[str, Decimal], account: str, amount: Decimal) -> None:
    from decimal import localcontext

    with localcontext() as context:
        context.prec = 500
        totals[account] = totals.get(account, Decimal(0)) + amount


def test_more_than_int64_takes_several_intervals() -> None:
    recorder = Recorder(0)
    for _ in range(3):
        recorder.add(stream(), 2**63 - 1)
    values = [value for n in range(5) for _, value in recorder.cut(n + 1).values]
    assert values == [2**63 - 1] * 3


def test_a_cut_takes_everything_once_under_threads() -> None:
    recorder = Recorder(0)
    each, threads = 5_000, 8
    done = threading.Event()
    taken: list[Decimal] = []

    def cutting() -> None:
        while not done.is_set():
            taken.extend(Decimal(shortest(v)) for _, v in recorder.cut(0).values)

    def adding() -> None:
        for n in range(each):
            recorder.add(stream(str(n % 10)), 1)
            recorder.add(stream("fraction"), Decimal("0.5"))

    cutters = [threading.Thread(target=cutting) for _ in range(2)]
    adders = [threading.Thread(target=adding) for _ in range(threads)]
    for thread in cutters + adders:
        thread.start()
    for thread in adders:
        thread.join()
    done.set()
    for thread in cutters:
        thread.join()
    taken.extend(Decimal(shortest(v)) for _, v in recorder.cut(0).values)
    assert sum(taken) == each * threads * Decimal("1.5")


def test_time_goes_forward_when_the_clock_steps_back() -> None:
    recorder = Recorder(1_000)
    cuts = [recorder.cut(now) for now in (2_000, 500, 500, 3_000)]
    assert [(c.start_ns, c.time_ns) for c in cuts] == [(1_000, 2_000), (2_000, 2_001), (2_001, 2_002), (2_002, 3_000)]


def test_past_the_limit_of_streams_usage_loses_its_dimensions_alone() -> None:
    recorder = Recorder(0, max_streams=3)
    for n in range(10):
        recorder.add(stream("acme", ("path", "string", str(n))), 1)
    sums = recorder.sums()
    assert sum(sums.values()) == 10
    assert sums[stream("acme")] == 7
    assert len(sums) == 4


def test_a_cut_taken_back_goes_out_with_the_next() -> None:
    recorder = Recorder(0)
    recorder.add(stream(), 5)
    recorder.take_back(recorder.cut(1))
    recorder.add(stream(), exact(0.5))
    assert recorder.cut(2).values == ((stream(), 5.5),)
    assert not recorder


def test_zero_makes_no_point() -> None:
    recorder = Recorder(0)
    recorder.add(stream(), 0)
    assert recorder.cut(1).values == ()


def test_the_first_usage_of_an_interval_is_announced() -> None:
    calls: list[int] = []
    recorder = Recorder(0, on_first=lambda: calls.append(1))
    recorder.add(stream(), 1)
    recorder.add(stream("b"), 1)
    assert len(calls) == 1
    recorder.cut(1)
    recorder.add(stream(), 1)
    assert len(calls) == 2
