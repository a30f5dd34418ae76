"""Whole processes: their end, their children, and the switch that silences them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

FORK = """
    import os, sys
    import tallymark
    tallymark.configure(interval=0.2)
    tallymark.identify(account="acme")
    for _ in range(100):
        tallymark.record("calls")
    if {export_first}:
        assert tallymark.flush(60)
        tallymark.record("calls", 50)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                tallymark.record("calls")
                code = 0 if tallymark.flush(60) else 2
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0, 0, 0], codes
    assert tallymark.flush(60)
"""


@pytest.mark.parametrize(("export_first", "want"), [(False, 103), (True, 153)])
def test_children_do_not_repeat_their_parent(collector: Any, run_script: Any, export_first: bool, want: int) -> None:
    done = run_script(FORK.format(export_first=export_first), TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": want}
    assert len({key[0] for key in collector.points()}) == 4


def test_a_child_of_a_named_producer_is_another_producer(collector: Any, run_script: Any) -> None:
    done = run_script(
        FORK.format(export_first=False),
        TALLYMARK_ENDPOINT=collector.endpoint,
        OTEL_RESOURCE_ATTRIBUTES="service.instance.id=pod-7",
    )
    assert done.returncode == 0, done.stderr
    producers = {key[0] for key in collector.points()}
    assert len(producers) == 4
    assert "pod-7" in producers
    assert collector.totals() == {"calls": 103}


def test_a_fork_while_threads_record_leaves_no_lock_behind(collector: Any, run_script: Any) -> None:
    done = run_script(
        """
        import os, threading
        import tallymark
        tallymark.configure(interval=60)
        stop = threading.Event()
        counts = [0] * 4
        def work(n):
            while not stop.is_set():
                tallymark.record("parent", 1)
                counts[n] += 1
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for t in threads: t.start()
        codes = []
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                tallymark.record("child", 0.5)
                os._exit(0 if tallymark.flush(60) else 2)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stop.set()
        for t in threads: t.join()
        assert codes == [0] * 10, codes
        assert tallymark.flush(60)
        print(sum(counts))
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"child": 5, "parent": int(done.stdout)}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of C have names there alone")
@pytest.mark.parametrize("under_way", [False, True])
def test_a_fork_finds_no_thread_of_grpc(under_way: bool, collector: Any, run_script: Any) -> None:
    """A lock that one of them held would be held for ever in the child, whose first request would stop all of it: the
    connection is closed for the fork, whether it is idle or a request is under way."""
    hanging = threading.Event()
    if under_way:
        collector.answer = lambda number: hanging.wait(60) and None if number else None
    done = run_script(
        f"""
        import os, pathlib, time
        seen = []
        def threads():
            names = set()
            for task in pathlib.Path("/proc/self/task").iterdir():
                try:
                    names.add((task / "comm").read_text().strip())
                except OSError:
                    pass
            return [name for name in names if name.startswith(("event_engine", "grpc_", "lifeguard"))]
        # What is registered first is called last.
        os.register_at_fork(before=lambda: seen.append(threads()))
        import tallymark
        tallymark.configure(interval=0.05, timeout=60)
        tallymark.identify(account="acme")
        tallymark.record("calls")
        assert tallymark.flush(60)
        if {under_way}:
            tallymark.record("calls")
            tallymark.flush(0.5)
        assert threads()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        assert seen == [[]], seen
        os._exit(0)
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    hanging.set()
    assert done.returncode == 0, done.stderr


def test_the_end_of_the_process_delivers(collector: Any, run_script: Any) -> None:
    done = run_script(
        """
        import tallymark
        tallymark.configure(interval=60)
        @tallymark.track_usage("calls")
        def handler(): return 1
        for _ in range(7): handler()
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 7}


def test_what_the_end_of_the_process_cannot_deliver_is_told(run_script: Any, unused_port: int) -> None:
    script = """
        import time, atexit
        atexit.register(lambda: print(time.monotonic() - began))
        import tallymark
        {configure}
        tallymark.record("calls", 7)
        tallymark.record("gigabytes", 0.5)
        tallymark.record("calls", 7)
        began = time.monotonic()
        """
    sent = run_script(
        script.format(configure="tallymark.configure(interval=0.05)"),
        TALLYMARK_ENDPOINT=f"http://127.0.0.1:{unused_port}",
        TALLYMARK_SHUTDOWN_TIMEOUT="0.5",
    )
    assert "calls=14, gigabytes=0.5" in sent.stderr
    assert float(sent.stdout) < 8, "it does not wait as long as it would untold"
    never_configured = run_script(script.format(configure=""))
    assert "calls=14, gigabytes=0.5" in never_configured.stderr


def test_opentelemetrys_switch_does_not_silence_billing(collector: Any, run_script: Any) -> None:
    done = run_script(
        "import tallymark; tallymark.configure(); tallymark.record('calls', 3)",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_SDK_DISABLED="true",
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}


@pytest.mark.parametrize("configure", ["tallymark.configure()", ""])
def test_our_switch_does(collector: Any, run_script: Any, configure: str) -> None:
    done = run_script(
        f"""
        import tallymark
        {configure}
        @tallymark.track_usage("calls")
        def handler(): return 1
        assert handler() == 1
        tallymark.record("calls", 3)
        assert tallymark.flush(1) and tallymark.shutdown(1)
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
        TALLYMARK_DISABLED="true",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert collector.requests == []
