"""A hundred thousand accounts in one interval: fifty times what OpenTelemetry's own SDK tells apart."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from tallymark import flush, identify, record
from tallymark.assembly import Runtime
from tests.delivery.test_sdk_killed import LAST
from tests.sdk.fake_collector import FakeCollector

ACCOUNTS = 100_000


def check(collector: FakeCollector) -> None:
    found: dict[str, int] = {}
    for (_, meter, _, attributes, _, _), value in collector.points().items():
        if meter == "calls":
            ((_, account),) = attributes
            name = account[2:].decode()
            found[name] = found.get(name, 0) + int(value)
    assert found == {f"account-{n}": n % 7 + 1 for n in range(ACCOUNTS)}


def test_each_arrives_by_its_name(fresh: Runtime, collector: FakeCollector, settings: Any) -> None:
    fresh.configure(settings(collector.endpoint, interval_s=120))
    for n in range(ACCOUNTS):
        with identify(account=f"account-{n}"):
            record("calls", n % 7 + 1)
    assert flush(100)
    check(collector)
    assert len({(start, end) for *_, start, end in collector.points()}) == 1, "one interval"
    assert max(len(raw) for raw in collector.stored) < 4 * 2**20, "what any receiver takes"


def test_each_arrives_from_a_process_that_was_killed(
    collector: FakeCollector, run_script: Any, state_dir: Path
) -> None:
    done = run_script(
        f"""
        import os, tallymark
        tallymark.configure(interval=120)
        for n in range({ACCOUNTS}):
            with tallymark.identify(account=f"account-{{n}}"):
                tallymark.record("calls", n % 7 + 1)
        os.kill(os.getpid(), 9)
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert collector.stored == []
    done = run_script(LAST, TALLYMARK_ENDPOINT=collector.endpoint, TALLYMARK_TIMEOUT="10")
    assert done.returncode == 0, done.stderr
    check(collector)
    assert [path for path in state_dir.rglob("*") if path.is_file()] == []
