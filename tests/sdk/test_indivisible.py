"""One line adds to a sum without a lock: nothing that Python code could do comes in the midst of it."""

from __future__ import annotations

import dis
import gc
import itertools
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tallymark.meters import Meter
from tallymark.quantities import Exact, add
from tallymark.recorder import INDIVISIBLE, Recorder, total_of
from tallymark.segment import Segment
from tallymark.streams import Series, Stream

SERIES = Series(Meter("m", "1"), ())

both = pytest.mark.parametrize(
    "indivisible", [False, pytest.param(True, marks=pytest.mark.skipif(not INDIVISIBLE, reason="no interpreter lock"))]
)


def stream(account: str = "acme") -> Stream:
    return (SERIES, account, None)


def test_what_must_be_indivisible_calls_nothing_and_is_one_line() -> None:
    """CPython gives way to other threads in calls and at backward jumps (`CHECK_EVAL_BREAKER` in its ceval.c)."""
    code = Recorder._add_at_once.__code__
    line = 0
    lines: dict[int, list[str]] = {}
    for instruction in dis.get_instructions(code):
        starts = instruction.starts_line if sys.version_info < (3, 13) else instruction.line_number
        line = starts or line
        lines.setdefault(int(line), []).append(instruction.opname)
    (addition,) = [names for names in lines.values() if "STORE_SUBSCR" in names]
    assert "LOAD_ATTR" in addition  # the look-up in the running interval's sums is in it too
    assert addition.count("BINARY_SUBSCR") + addition.count("BINARY_OP") >= 4
    kinds = {name.split("_")[0] for name in addition}
    assert kinds <= {
        "LOAD",
        "STORE",
        "BINARY",
        "INPLACE",
        "UNPACK",
        "COPY",
        "SWAP",
        "DUP",
        "ROT",
        "POP",
        "RETURN",
        "PUSH",
    }


class Node:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def collecting_all_the_time() -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)


@both
def test_finalizers_callbacks_and_the_collector_itself_may_record(indivisible: bool) -> None:
    recorder = Recorder(0, indivisible=indivisible)
    want = [0]

    def record(*args: object) -> None:
        want[0] += 1
        recorder.add(stream(), 1)

    class Finalized(Node):
        def __del__(self) -> None:
            record()

    references: list[Any] = []
    gc.callbacks.append(record)
    try:
        with collecting_all_the_time():
            for n in range(2_000):
                Finalized()
                references[:] = [weakref.ref(Node(), record)]
                record()
                recorder.add(stream(str(n % 7)), 1)
    finally:
        gc.callbacks.remove(record)
    sums = {found.account: amount for found, amount in recorder.sums().items()}
    assert want[0] > 4_000
    assert sums.pop("acme") == want[0]
    assert sum(sums.values()) == 2_000


@both
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_signals_handlers_may_record(indivisible: bool) -> None:
    recorder = Recorder(0, indivisible=indivisible)
    want = {"acme": 0, "handler": 0}

    def handler(*args: object) -> None:
        want["handler"] += 1
        recorder.add(stream(), 1)
        recorder.add(stream("handler"), 1)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while want["handler"] < 200:
            recorder.add(stream(), 1)
            want["acme"] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    sums = {found.account: amount for found, amount in recorder.sums().items()}
    assert sums == {"acme": want["acme"] + want["handler"], "handler": want["handler"]}


@pytest.mark.skipif(not INDIVISIBLE, reason="no interpreter lock")
def test_a_trace_function_lets_others_cut_at_any_line() -> None:
    """As a debugger does, and a coverage tool: between any two lines, the interval may end."""
    recorder = Recorder(0, indivisible=True)
    taken: list[Exact] = []
    lines = itertools.count()

    def cut() -> None:
        thread = threading.Thread(target=lambda: taken.extend(totals(recorder)))
        thread.start()
        thread.join(30)
        cutting.append(thread)

    def trace(frame: Any, event: str, argument: object) -> Any:
        if frame.f_code is not Recorder._add_at_once.__code__:
            return None
        if event == "line" and next(lines) % 3 == 0 and len(cutting) < 60:
            cut()
        return trace

    cutting: list[threading.Thread] = []
    calls = 200
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(calls):
            recorder.add(stream(), 1)
    finally:
        sys.settrace(before)
    for thread in cutting:
        thread.join()
    taken.extend(totals(recorder))
    assert len(cutting) > 20
    assert sum(taken) == calls


def totals(recorder: Recorder) -> list[Exact]:
    """What a cut takes, read at once, as the journal reads it."""
    return [amount for segment in recorder.cut(0) for amount in total_of(segment.contents()).values()]


@both
def test_threads_that_add_while_others_cut_lose_nothing(indivisible: bool, tmp_path: Path) -> None:
    threads, calls, accounts = 8, 20_000, 50
    numbers = iter(range(10**9))
    recorder = Recorder(
        0, lambda start: Segment(tmp_path / f"{next(numbers)}.segment", start, 10), indivisible=indivisible
    )
    got: dict[str | None, Exact] = {}
    started = threading.Barrier(threads + 1)
    ended = threading.Event()

    def add_many() -> None:
        started.wait()
        for n in range(calls):
            recorder.add(stream(f"account-{n % accounts}"), 1)

    def take() -> None:
        for segment in recorder.cut(0):
            for found, amount in total_of(segment.contents()).items():
                got[found.account] = add(got.get(found.account, 0), amount)
            segment.close()

    def cut_often() -> None:
        while not ended.is_set():
            take()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=add_many) for _ in range(threads)]
        cutting = threading.Thread(target=cut_often)
        for thread in (*running, cutting):
            thread.start()
        started.wait()
        for thread in running:
            thread.join()
        ended.set()
        cutting.join()
    finally:
        sys.setswitchinterval(interval)
    take()
    assert got == {f"account-{n}": threads * calls // accounts for n in range(accounts)}
