"""What waits for the end of a call does not wait for ever, and is counted once."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tallymark import identify, measure, track_usage
from tallymark.assembly import Runtime
from tallymark.calls import Call, HttpCall, LateCalls
from tallymark.integrations.serving import serving
from tests.sdk.fake_collector import FakeCollector


@track_usage("late.calls")
def fails() -> None:
    raise LookupError


def fail(times: int) -> None:
    for _ in range(times):
        with contextlib.suppress(LookupError):
            fails()


def test_a_request_that_takes_long_keeps_no_usage_in_memory(
    fresh: Runtime, collector: FakeCollector, settings: Callable[..., Any]
) -> None:
    fresh.configure(settings(collector.endpoint, interval_s=0.1))
    with serving(HttpCall()):
        identify(account="acme")
        fail(50)
        deadline = time.monotonic() + 30
        while collector.totals() != {"late.calls": 50} and time.monotonic() < deadline:
            time.sleep(0.02)
        assert collector.totals() == {"late.calls": 50}, "before the request has ended"
        fail(1)
    assert fresh.flush(60)
    assert collector.totals() == {"late.calls": 51}


def test_the_end_of_the_process_waits_for_no_request(
    fresh: Runtime, collector: FakeCollector, settings: Callable[..., Any]
) -> None:
    fresh.configure(settings(collector.endpoint, interval_s=60))
    with serving(HttpCall()):
        identify(account="acme")
        fail(3)
        assert fresh.recorder.sums() == {}
        assert fresh.shutdown(60)
    assert collector.totals() == {"late.calls": 3}


def test_what_is_only_known_at_the_end_waits_for_it(fresh: Runtime) -> None:
    @track_usage("late.bytes", measure.response_bytes)
    def handler() -> None: ...

    call = HttpCall()
    with serving(call):
        identify(account="acme")
        handler()
        fail(2)
        fresh.late.settle(0)
        assert {stream.meter: amount for stream, amount in fresh.recorder.sums().items()} == {"late.calls": 2}
        call.response_bytes = 700
    assert {s.meter: n for s, n in fresh.recorder.sums().items()} == {"late.calls": 2, "late.bytes": 700}


def test_only_what_has_waited_long_enough_is_settled() -> None:
    now, done = [0.0], list[str]()
    late = LateCalls(lambda: now[0])
    first, second = Call(), Call()
    assert first.at_end(lambda: done.append("first"), late)
    now[0] = 5.0
    assert second.at_end(lambda: done.append("second"), late)
    late.settle(5)
    assert done == ["first"]
    assert first.at_end(lambda: done.append("first again"), late)
    now[0] = 10.0
    late.settle(5)
    assert done == ["first", "second", "first again"]
    first.end()
    second.end()
    assert len(done) == 3


def test_calls_that_nobody_knows_any_more_are_let_go() -> None:
    late = LateCalls()
    Call().at_end(lambda: pytest.fail("its request is gone"), late)
    late.settle(0)
    assert not late._calls


def test_settling_beside_the_end_counts_each_once() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            counted: list[int] = []
            late, call = LateCalls(), Call()
            for number in range(20):
                early = late if number % 2 else None
                assert call.at_end(partial(counted.append, number), early)
            threads = [threading.Thread(target=call.settle), threading.Thread(target=call.end)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(counted) == list(range(20))
    finally:
        sys.setswitchinterval(interval)
