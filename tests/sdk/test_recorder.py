import threading
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark.batches import requests_of
from tallymark.meters import Meter
from tallymark.quantities import EXACT, Exact, add, exact
from tallymark.recorder import SPARE_NS, Recorder, by_meter, total_of
from tallymark.segment import Contents, Segment, read
from tallymark.streams import Described, Series, Stream, decode, encode

METER = Meter("m", "1")
known: dict[tuple[tuple[str, str, str], ...], Series] = {}


def stream(account: str = "acme", *dimensions: tuple[str, str, str]) -> Stream:
    return (known.setdefault(dimensions, Series(METER, dimensions)), account, None)


def described(account: str = "acme", *dimensions: tuple[str, str, str]) -> Described:
    return Described("m", "1", account, None, dimensions)


def cut(recorder: Recorder, now_ns: int = 0) -> list[Contents]:
    return [segment.contents() for segment in recorder.cut(now_ns)]


recordings = st.one_of(
    st.integers(0, 2**63 - 1),
    st.floats(0, 1e12, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-13),
    st.decimals(0, 10**15, places=24),
)
steps = st.lists(st.tuples(st.sampled_from("abc"), recordings) | st.just("cut"), max_size=60)


@given(steps, st.data())
def test_sums_over_any_cuts_are_the_exact_total(script: list[object], data: st.DataObject) -> None:
    recorder = Recorder(100)
    want: dict[str, Exact] = {}
    got: dict[str, Exact] = {}
    last = 100

    def take() -> None:
        nonlocal last
        for taken in cut(recorder, data.draw(st.integers(0, 1000))):  # a clock that jumps about
            assert taken.start_ns == last
            assert taken.end_ns > last
            last = taken.end_ns
            for found, amount in total_of(taken).items():
                assert amount > 0
                assert found.account is not None
                got[found.account] = add(got.get(found.account, 0), amount)

    for step in script:
        if step == "cut":
            take()
        else:
            account, amount = step  # type: ignore[misc]
            recorder.add(stream(account), exact(amount))
            want[account] = add(want.get(account, 0), exact(amount))
    take()
    assert not recorder
    assert got == {account: total for account, total in want.items() if total}


def test_a_sum_over_int64_is_kept_whole() -> None:
    recorder = Recorder(0)
    for _ in range(3):
        recorder.add(stream(), 2**63 - 1)
        recorder.add(stream("wide"), EXACT.scaleb(Decimal(10**30 + 1), -30))
    assert recorder.sums() == {
        described(): 3 * (2**63 - 1),
        described("wide"): Decimal("3.000000000000000000000000000003"),
    }


def test_a_tenth_ten_times_is_one() -> None:
    recorder = Recorder(0)
    for _ in range(10):
        recorder.add(stream(), exact(0.1))
    assert recorder.sums() == {described(): 1}


def test_a_cut_takes_everything_once_under_threads() -> None:
    recorder = Recorder(0)
    each, threads = 5_000, 8
    done = threading.Event()
    taken: list[Exact] = []

    def cutting() -> None:
        while not done.is_set():
            taken.extend(by_meter(*cut(recorder)).values())

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
    taken.extend(by_meter(*cut(recorder)).values())
    assert sum(taken) == each * threads * Decimal("1.5")


def test_a_clock_that_was_hours_ahead_and_is_set_right_does_not_date_usage_in_the_future() -> None:
    hour = 3600 * 1_000_000_000
    recorder = Recorder(10 * hour)
    recorder.add(stream(), 1)
    ends = [c.end_ns for c in cut(recorder, 10 * hour + 5)]
    spans = []
    for now in (8 * hour, 8 * hour + 10, 8 * hour + 20):
        recorder.add(stream(), 1)
        for taken in cut(recorder, now):
            [request] = requests_of(taken, b"")
            message = ExportMetricsServiceRequest.FromString(request.body)
            [number] = message.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points
            spans.append((number.start_time_unix_nano, number.time_unix_nano))
            assert number.as_int == 1
    assert ends == [10 * hour + 2 * SPARE_NS]
    assert spans[0] == (8 * hour - 1_000, 8 * hour)
    assert all(before[1] == after[0] < after[1] <= 8 * hour + 10_000 for before, after in pairwise(spans))


def test_time_goes_forward_when_the_clock_steps_back() -> None:
    recorder = Recorder(1_000_000_000)
    times = []
    for now in (2_000_000_000, 500, 500, 3_000_000_000):
        recorder.add(stream(), 1)
        times += [(c.start_ns, c.end_ns) for c in cut(recorder, now)]
    spare = 2 * SPARE_NS
    assert times == [
        (1_000_000_000, 2_000_000_000),
        (2_000_000_000, 2_000_000_000 + spare),
        (2_000_000_000 + spare, 2_000_000_000 + 2 * spare),
        (2_000_000_000 + 2 * spare, 3_000_000_000),
    ]


def test_past_the_limit_of_streams_usage_loses_its_dimensions_alone() -> None:
    recorder = Recorder(0, max_streams=3)
    for n in range(10):
        recorder.add(stream("acme", ("path", "string", str(n))), 1)
        recorder.add(stream("acme", ("path", "string", str(n))), 2**63 - 1)
    sums = recorder.sums()
    assert sum(sums.values()) == 10 * 2**63
    assert len(sums) == 3


def test_zero_and_nothing_make_no_segment() -> None:
    recorder = Recorder(0)
    recorder.add(stream(), 0)
    assert recorder.cut(1) == []


def test_the_first_usage_of_an_interval_is_announced() -> None:
    calls: list[int] = []
    recorder = Recorder(0, on_first=lambda: calls.append(1))
    recorder.add(stream(), 1)
    recorder.add(stream("b"), 1)
    assert len(calls) == 1
    cut(recorder)
    recorder.add(stream(), 1)
    assert len(calls) == 2


def on_disk(folder: Path) -> Callable[[int], Segment]:
    numbers = iter(range(1, 1000))

    def new_segment(start_ns: int) -> Segment:
        number = next(numbers)
        return Segment(folder / f"{number}.segment", start_ns, 10, b"{}", number)

    return new_segment


def test_what_an_add_has_returned_from_is_in_the_file(tmp_path: Path) -> None:
    recorder = Recorder(0, on_disk(tmp_path))
    want: dict[Described, Exact] = {}
    for n in range(1, 3000):  # enough for several chunks
        account, quantity = f"a{n % 700}", exact((n % 7) / 8) if n % 3 else n
        recorder.add(stream(account, ("k", "string", "x" * 100)), quantity)
        key = described(account, ("k", "string", "x" * 100))
        if quantity:
            want[key] = add(want.get(key, 0), quantity)
        if n % 500 == 0:
            assert total_of(read(tmp_path / "1.segment")) == want
    found = read(tmp_path / "1.segment")
    assert total_of(found) == want
    assert (found.end_ns, found.damaged, found.producer) == (0, False, b"{}")


class FullDisk(Segment):
    """A segment whose file takes no more than its first chunk."""

    def _grow(self, length: int) -> None:
        if self._size and self.path is not None:
            raise OSError(28, "No space left on device")
        super()._grow(length)


def test_a_full_disk_turns_to_memory_and_streams_keep_their_points_apart(tmp_path: Path) -> None:
    told: list[OSError] = []
    recorder = Recorder(0, lambda start: FullDisk(tmp_path / f"{start}.segment", start, 10), on_spill=told.append)
    for n in range(2000):
        recorder.add(stream(f"account-{n}"), 1)
        recorder.add(stream(f"account-{n}"), Decimal("0.5"))
    assert recorder.spilled > 1000
    assert len(told) == recorder.spilled
    first, second = recorder.cut(10**12)
    a, b = first.contents(), second.contents()
    assert (first.path is not None, second.path) == (True, None)
    assert a.end_ns == b.start_ns < b.end_ns == 10**12
    assert by_meter(a, b) == {"m": 3000}


@pytest.mark.parametrize("account", [None, "ä\u2028€", "x" * 255])
def test_streams_are_read_back_as_they_were(account: str | None) -> None:
    dimensions = (("b", "bool", True), ("d", "double", 1.0), ("i", "int", 2**63 - 1), ("s", "string", "\U0001f600"))
    found = decode(encode((Series(METER, dimensions), account, None)))
    assert found == Described("m", "1", account, None, dimensions)
    assert [type(value) for _, _, value in found.dimensions] == [bool, float, int, str]


def test_a_signals_handler_that_records_in_the_midst_of_recording(tmp_path: Path) -> None:
    class Interrupted(Segment):
        def _grow(self, length: int) -> None:
            super()._grow(length)
            if self._used > 1000:  # the handler runs here
                recorder.add(stream("handler"), 1)
                recorder.add(stream("handler"), Decimal("0.5"))

    recorder = Recorder(0, lambda start: Interrupted(tmp_path / "1.segment", start, 10))
    for n in range(2000):
        recorder.add(stream(f"account-{n}"), 1)
    sums = recorder.sums()
    assert sums.pop(described("handler")) in (1.5, 3)
    assert set(sums.values()) == {1}
    assert len(sums) == 2000


def test_an_exception_out_of_a_signals_handler_leaves_the_lock_free() -> None:
    recorder = Recorder(0, indivisible=False)
    recorder.add(stream(), 1)

    class Waiting:
        def __call__(self) -> None:
            raise KeyboardInterrupt

    acquire, recorder._acquire = recorder._acquire, Waiting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        recorder.add(stream(), 1)
    recorder._acquire = acquire
    thread = threading.Thread(target=recorder.add, args=(stream(), 1))
    thread.start()
    thread.join(60)
    assert recorder.sums() == {described(): 2}
