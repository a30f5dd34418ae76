"""Whole processes with a journal: forks, signals, full disks, shared folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.fake_collector import FakeCollector


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    started = FakeCollector()
    yield started
    started.stop()


@pytest.fixture
def run(tmp_path: Path, collector: FakeCollector) -> Any:
    def start(source: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                "TALLYMARK_ENDPOINT": collector.endpoint,
                "TALLYMARK_STATE_DIR": str(tmp_path / "state"),
                "TALLYMARK_TIMEOUT": "10",
                **env,
            },
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return start


DELIVER = """
import tallymark, time
from tallymark import runtime
tallymark.configure(interval=0.05)
tallymark.record("last")
own = runtime.current()
deadline = time.monotonic() + 90
while not tallymark.flush(2) or own.outbox.batches(own=False) or own.recovery.is_needed(
    own.letters.place, own.journal.where()
):
    assert time.monotonic() < deadline
    time.sleep(0.05)
"""


def files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "state").rglob("*") if path.is_file()]


def test_killed_children_and_parent_are_recovered_under_their_own_names(
    tmp_path: Path, collector: FakeCollector, run: Any
) -> None:
    done = run(
        """
        import os, signal, tallymark
        tallymark.configure(interval=60)
        tallymark.record("calls", 100)
        for n in range(3):
            pid = os.fork()
            if pid == 0:
                tallymark.record("calls", 1)
                tallymark.record("calls", 0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(pid, 0)
        tallymark.record("calls", 1000)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.returncode == -signal.SIGKILL
    assert collector.requests == []
    done = run(DELIVER)
    assert done.returncode == 0, done.stderr
    assert str(collector.totals()["calls"]) == "1103.3"
    assert len({key[0] for key in collector.points() if key[1] == "calls"}) == 4
    assert files(tmp_path) == []


def test_a_child_that_outlives_its_parent_does_not_hold_its_lock(
    tmp_path: Path, collector: FakeCollector, run: Any
) -> None:
    done = run(
        """
        import os, signal, subprocess, sys, time, tallymark
        tallymark.configure(interval=60)
        tallymark.record("calls", 7)
        if os.fork() == 0:
            os.close(0), os.close(1), os.close(2)
            time.sleep(8)
            os._exit(0)
        subprocess.Popen(["sleep", "8"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.returncode == -signal.SIGKILL
    done = run(DELIVER)
    assert done.returncode == 0, done.stderr
    assert collector.totals()["calls"] == 7


def test_multiprocessing_by_fork_counts_each_call_once(collector: FakeCollector, run: Any) -> None:
    done = run(
        """
        import multiprocessing, tallymark
        tallymark.configure(interval=0.1)
        @tallymark.track_usage("calls")
        def handler(n):
            return n
        def work(n):
            handler(n)
            return tallymark.flush(60)
        if __name__ == "__main__":
            handler(0)
            with multiprocessing.get_context("fork").Pool(3) as pool:
                assert all(pool.map(work, range(60)))
            assert tallymark.flush(60)
        """
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 61}


def test_a_child_forked_while_its_parent_sends_can_send(collector: FakeCollector, run: Any) -> None:
    """gRPC skips its own preparation for a fork while a thread is at work in it; such a child could never send."""
    done = run(
        """
        import os, threading, tallymark
        tallymark.configure(interval=0.001, timeout=5)
        stop = threading.Event()
        counted = 0
        def work():
            global counted
            while not stop.is_set():
                tallymark.record("parent")
                counted += 1
                tallymark.flush(5)
        thread = threading.Thread(target=work)
        thread.start()
        codes = []
        for n in range(30):
            pid = os.fork()
            if pid == 0:
                tallymark.record("child")
                os._exit(0 if tallymark.flush(60) else 2)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stop.set()
        thread.join()
        assert codes == [0] * 30, codes
        assert tallymark.flush(60)
        print(counted)
        """
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"parent": int(done.stdout), "child": 30}


def test_sigterm_that_nobody_handles_leaves_the_usage_to_the_next_process(
    tmp_path: Path, collector: FakeCollector, run: Any
) -> None:
    done = run(
        """
        import os, signal, tallymark
        tallymark.configure(interval=60)
        tallymark.record("calls", 0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert done.returncode == -signal.SIGTERM
    assert collector.requests == []
    assert run(DELIVER).returncode == 0
    assert str(collector.totals()["calls"]) == "0.3"
    assert files(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 30_000, 65_536, 150_000])
def test_a_disk_that_takes_no_more_turns_to_memory(collector: FakeCollector, run: Any, limit: int) -> None:
    done = run(
        f"""
        import resource, tallymark
        from tallymark.testing import delivery_stats
        tallymark.configure(interval=60)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        for n in range(3000):
            with tallymark.identify(account=f"account-{{n}}"):
                tallymark.record("calls", 1)
                tallymark.record("parts", 0.1)
        assert delivery_stats()["in_memory"] > 0
        assert tallymark.flush(60)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kept in memory") == 1, done.stderr
    assert collector.totals() == {"calls": 3000, "parts": 300}


def test_a_folder_that_cannot_be_made_is_told_and_costs_nothing(collector: FakeCollector, run: Any) -> None:
    done = run(
        """
        import tallymark
        tallymark.configure()
        tallymark.record("calls", 3)
        """,
        TALLYMARK_STATE_DIR="/proc/nowhere",
    )
    assert done.returncode == 0
    assert "kept in memory" in done.stderr
    assert collector.totals() == {"calls": 3}


def test_usage_of_one_credential_is_not_sent_with_another(tmp_path: Path, collector: FakeCollector, run: Any) -> None:
    killed = """
        import os, signal, tallymark
        tallymark.configure(interval=60)
        tallymark.record("calls", 7)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    run(killed, TALLYMARK_HEADERS="authorization=a")
    told = run(DELIVER, TALLYMARK_HEADERS="authorization=b")
    assert told.returncode == 0
    assert "for the endpoint and the headers it was recorded for" in told.stderr
    assert collector.totals() == {"last": 1}
    assert run(DELIVER, TALLYMARK_HEADERS="authorization=a").returncode == 0
    assert collector.totals() == {"last": 2, "calls": 7}
    assert {
        m["authorization"] for m, raw in zip(collector.metadata, collector.requests, strict=True) if b"calls" in raw
    } == {"a"}
    assert files(tmp_path) == []


def test_a_process_that_only_configures_and_forks_leaves_recovery_to_its_children(
    collector: FakeCollector, run: Any
) -> None:
    run("import os, tallymark; tallymark.configure(); tallymark.record('calls'); os.kill(os.getpid(), 9)")
    done = run(
        """
        import os, sys, time, warnings
        warnings.simplefilter("ignore")
        from tallymark import exporting
        exporting.RECOVERY_DELAY_S = 0.5
        import tallymark
        tallymark.configure(interval=0.1)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(1)
        from tallymark import runtime
        assert runtime.current().exporter._delivery._client is None
        os._exit(0)
        """
    )
    assert done.returncode == 0, done.stderr
    assert collector.requests == []
