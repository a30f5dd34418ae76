"""Celery with real workers over a broker of files: each run once, for whom it was sent, also when the worker ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark import identify, record, track_usage
from tallymark.calls import current_call
from tallymark.identity import current_identity
from tallymark.integrations.celery import meter_tasks
from tallymark.testing import Captured
from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import eventually

APP = """
    import os, time
    import tallymark
    from celery import Celery
    from tallymark import track_usage
    from tallymark.integrations.celery import meter_tasks

    box = os.environ["BOX"]
    app = Celery("jobs", broker="filesystem://")
    app.conf.update(
        broker_transport_options={
            "data_folder_in": box + "/queue", "data_folder_out": box + "/queue", "control_folder": box + "/control",
            "processed_folder": box + "/done", "store_processed": True,
        },
        task_ignore_result=True, worker_prefetch_multiplier=1, worker_hijack_root_logger=False,
    )
    meter_tasks(app, track=[track_usage("jobs")], carry_identity=True)
    tallymark.configure(interval=600)  # nothing leaves but at the end

    @app.task
    @track_usage("units", quantity=lambda result: result, unit="{unit}")
    def work(units):
        return units

    @app.task(bind=True, max_retries=2, default_retry_delay=0)
    @track_usage("tries")
    def flaky(self):
        if self.request.retries < 2:
            raise self.retry(countdown=0)

    @app.task(autoretry_for=(KeyError,), max_retries=1, retry_backoff=False, default_retry_delay=0)
    @track_usage("tries")
    def automatic():
        raise KeyError("always")

    @app.task
    def parent():
        work.delay(1000)

    @app.task
    def slow():
        open(box + "/started", "w").close()
        time.sleep(2)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    for folder in ("queue", "control", "done"):
        (tmp_path / folder).mkdir()
    (tmp_path / "jobs_app.py").write_text(textwrap.dedent(APP))
    return tmp_path


def environ(box: Path, collector: FakeCollector, state_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "BOX": str(box),
        "PYTHONPATH": os.pathsep.join([str(Path("sdk").resolve()), str(box)]),
        "TALLYMARK_ENDPOINT": collector.endpoint,
        "TALLYMARK_STATE_DIR": str(state_dir),
    }


def send(source: str, env: dict[str, str]) -> None:
    lines = "import tallymark\nfrom jobs_app import *\n" + textwrap.dedent(source)
    done = subprocess.run(
        [sys.executable, "-c", lines], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def accounts(collector: FakeCollector, meter: str) -> dict[tuple[Any, ...], int]:
    """(account, task, state, error type) -> quantity, of what has left the workers."""
    found: dict[tuple[Any, ...], int] = {}
    names = ("tallymark.account.id", "tallymark.task.name", "tallymark.task.state", "error.type")
    for raw in collector.stored:
        for resource in ExportMetricsServiceRequest.FromString(raw).resource_metrics:
            for metric in resource.scope_metrics[0].metrics:
                for point in metric.sum.data_points if metric.name == meter else ():
                    values = {a.key: a.value.string_value for a in point.attributes}
                    key = tuple(values.get(name) for name in names)
                    found[key] = found.get(key, 0) + point.as_int
    return found


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_warm_shutdown_loses_nothing(collector: FakeCollector, jobs: Path, state_dir: Path, pool: str) -> None:
    env = environ(jobs, collector, state_dir)
    send(
        """
        with tallymark.identify(account="acme", plan="pro"):
            for units in range(20): work.delay(units)
            flaky.delay()
            parent.delay()
        with tallymark.identify(account="globex"):
            automatic.delay()
        work.delay(7)
        """,
        env,
    )
    log = (jobs / "log").open("wb")
    command = [sys.executable, "-m", "celery", "-A", "jobs_app", "worker", "-P", pool, "-c", "2", "-l", "INFO"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    worker = subprocess.Popen(command, env=env, cwd=jobs, stdout=log, stderr=log)
    text = lambda: (jobs / "log").read_text()  # noqa: E731
    try:
        # 22 runs of work, 3 of flaky, 2 of automatic, one of parent
        ends = ("succeeded in", "Retry in", "raised unexpected")
        eventually(lambda: worker.poll() is not None or sum(text().count(end) for end in ends) >= 28)
        assert worker.poll() is None, text()[-3000:]
        send("with tallymark.identify(account='late'): slow.delay()", env)
        eventually(lambda: (jobs / "started").exists())
        assert collector.stored == []
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        log.close()
    assert accounts(collector, "units") == {
        ("acme", "jobs_app.work", "SUCCESS", None): sum(range(20)) + 1000,
        (None, "jobs_app.work", "SUCCESS", None): 7,
    }, text()[-3000:]
    assert accounts(collector, "jobs") == {
        ("acme", "jobs_app.work", "SUCCESS", None): 21,
        (None, "jobs_app.work", "SUCCESS", None): 1,
        ("acme", "jobs_app.flaky", "RETRY", None): 2,
        ("acme", "jobs_app.flaky", "SUCCESS", None): 1,
        ("acme", "jobs_app.parent", "SUCCESS", None): 1,
        ("globex", "jobs_app.automatic", "RETRY", None): 1,
        ("globex", "jobs_app.automatic", "FAILURE", "KeyError"): 1,
        ("late", "jobs_app.slow", "SUCCESS", None): 1,
    }
    assert accounts(collector, "tries") == {
        ("acme", "jobs_app.flaky", "RETRY", None): 2,
        ("acme", "jobs_app.flaky", "SUCCESS", None): 1,
        ("globex", "jobs_app.automatic", "RETRY", None): 1,
        ("globex", "jobs_app.automatic", "FAILURE", "KeyError"): 1,
    }


def eager(**kwargs: Any) -> Celery:
    app = Celery("eager", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    meter_tasks(app, **kwargs)
    return app


def rows(usage: Captured) -> dict[tuple[Any, ...], Any]:
    names = ("tallymark.task.name", "tallymark.task.state", "error.type")
    return {(u.meter, u.account, *(u.attributes.get(name) for name in names)): u.quantity for u in usage}


@pytest.mark.parametrize("carry", [True, False])
def test_eager_tasks_are_as_a_worker_would_run_them(usage: Captured, carry: bool) -> None:
    app = eager(carry_identity=carry, track=[track_usage("jobs")])

    @app.task(name="outer")
    def outer() -> None:
        inner.delay()
        record("after")

    @app.task(name="inner")
    @track_usage("calls")
    def inner() -> None:
        identify(account="inner")

    @app.task(name="ignored")
    def ignored() -> None:
        raise Ignore

    with identify(account="caller"):
        outer.delay()
        ignored.delay()
        assert current_identity().account == "caller"
        assert current_call.get() is None
    who = "caller" if carry else None
    assert rows(usage) == {
        ("calls", "inner", "inner", "SUCCESS", None): 1,
        ("jobs", who, "outer", "SUCCESS", None): 1,
        ("jobs", who, "ignored", "IGNORED", None): 1,
        ("jobs", "inner", "inner", "SUCCESS", None): 1,
        ("after", who, "outer", None, None): 1,
    }


def test_the_resolver_has_the_last_word_and_other_applications_are_left_alone(usage: Captured) -> None:
    successes = track_usage("successes", billable=lambda call: call.error is None)
    app = eager(identify=lambda task: task.request.kwargs, track=[successes], carry_identity=True)
    meter_tasks(app, track=[successes])  # nothing more
    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.task_always_eager = True

    @app.task(name="mine")
    def mine(account: str | None = None, fail: bool = False) -> None:
        if fail:
            raise ZeroDivisionError

    @other.task(name="theirs")
    def theirs() -> None:
        assert current_call.get() is None

    mine.delay(account="named")
    mine.delay(account="named", fail=True)
    theirs.delay()
    assert rows(usage) == {("successes", "named", "mine", "SUCCESS", None): 1}
