"""A process whose threads gevent has made greenlets of: sending stops none of them, and everything arrives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import PATIENCE_S, ask, eventually

PATCHED = """
    from gevent import monkey
    monkey.patch_all()
    import gevent, os, sys, tallymark
"""


def test_other_greenlets_go_on_while_a_request_is_under_way(run_script: Callable[..., Any]) -> None:
    with socket.socket() as silent, ThreadPoolExecutor(1) as pool:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)

        def take() -> tuple[socket.socket, bytes]:
            """A collector that takes a request and never answers."""
            connection, _ = silent.accept()
            return connection, connection.recv(1)

        silent.settimeout(PATIENCE_S)
        taken = pool.submit(take)
        done = run_script(
            PATCHED
            + """
    tallymark.configure(interval=0.05, timeout=30, shutdown_timeout=0.1)
    tallymark.record("calls", 1)
    from tallymark import runtime
    delivery = runtime.current().exporter._delivery
    with gevent.Timeout(60):
        while not delivery._is_running:
            gevent.sleep(0.001)
    ticks = 0
    while ticks < 200 and delivery._is_running:
        gevent.sleep(0.001)
        ticks += 1
    assert ticks == 200, f"the request was over after {ticks} turns of another greenlet"
    assert delivery._is_running
    """,
            TALLYMARK_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )
        connection, first = taken.result(PATIENCE_S)
        connection.close()
    assert first == b"P"  # of HTTP/2's preface
    assert done.returncode == 0, done.stderr
    assert "usage that no collector has acknowledged: calls=1; the next process delivers" in done.stderr


@pytest.mark.parametrize("grpcs_own", ["", "import grpc.experimental.gevent as own; own.init_gevent()"])
def test_everything_arrives(run_script: Callable[..., Any], collector: FakeCollector, grpcs_own: str) -> None:
    done = run_script(
        PATCHED
        + f"""
    {grpcs_own}
    tallymark.configure(interval=0.05, shutdown_timeout=60)

    def work(account):
        with tallymark.identify(account=account):
            for _ in range(50):
                tallymark.record("calls")
                gevent.sleep(0.001)

    gevent.joinall([gevent.spawn(work, f"account-{{n}}") for n in range(20)], raise_error=True)
    assert tallymark.flush(60)
    tallymark.record("calls")
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert collector.totals() == {"calls": 1001}
    assert len(collector.closed()) == 1


def test_what_instruments_grpc_is_told_to_leave_our_requests_alone_in_the_real_thread_too(
    run_script: Callable[..., Any], collector: FakeCollector
) -> None:
    done = run_script(
        PATCHED
        + """
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, get_value
    from tallymark.sending import GrpcClient

    class Asked(GrpcClient):
        def _send(self, body):
            found.append((get_value(_SUPPRESS_INSTRUMENTATION_KEY), threads() != main))
            return super()._send(body)

    found = []
    threads = monkey.get_original("_thread", "get_ident")
    main = threads()
    tallymark.assembly.GrpcClient = Asked
    tallymark.configure()
    tallymark.record("calls")
    assert tallymark.flush(60)
    assert found and set(found) == {(True, True)}, found
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert collector.totals() == {"calls": 1}


def test_a_forked_child_sends_its_own(run_script: Callable[..., Any], collector: FakeCollector) -> None:
    done = run_script(
        PATCHED
        + """
    tallymark.configure(interval=0.01, shutdown_timeout=60)
    tallymark.record("calls")
    assert tallymark.flush(60)
    for n in range(5):
        tallymark.record("calls")
        child = os.fork()
        if not child:
            tallymark.record("calls", 100)
            os._exit(0 if tallymark.flush(60) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr  # a request that the fork has broken off may be told of
    assert collector.totals() == {"calls": 506}


def test_gevent_is_not_imported_for_it(run_script: Callable[..., Any], collector: FakeCollector) -> None:
    done = run_script(
        """
    import sys, tallymark
    tallymark.configure()
    tallymark.record("calls")
    assert tallymark.flush(60)
    assert "gevent" not in sys.modules
    import gevent.monkey  # which alone patches nothing
    tallymark.record("calls")
    assert tallymark.flush(60)
    assert not gevent.monkey.is_module_patched("threading")
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert collector.totals() == {"calls": 2}


SERVICE = """
import flask, tallymark
from tallymark.integrations.flask import init_app

tallymark.configure()
app = flask.Flask(__name__)
init_app(app, track=[tallymark.track_usage("requests")])

@app.get("/")
def home():
    return "x"
"""


def test_gunicorns_gevent_workers(collector: FakeCollector, tmp_path: Path, state_dir: Path, unused_port: int) -> None:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    command = [sys.executable, "-m", "gunicorn", "service:app", "-b", f"127.0.0.1:{unused_port}", "--workers", "2"]
    environ = {
        **os.environ,
        "TALLYMARK_ENDPOINT": collector.endpoint,
        "TALLYMARK_STATE_DIR": str(state_dir),
        "TALLYMARK_EXPORT_INTERVAL": "0.1",
        "PYTHONPATH": os.pathsep.join([str(Path("sdk").resolve()), str(tmp_path)]),
    }
    log = tmp_path / "log"
    with log.open("wb") as out:
        service = subprocess.Popen([*command, "-k", "gevent"], env=environ, cwd=tmp_path, stdout=out, stderr=out)
    try:

        def is_up() -> bool:
            assert service.poll() is None, log.read_text()
            with suppress(OSError):
                return ask(unused_port, "/") == 200
            return False

        eventually(is_up)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: ask(unused_port, "/"), range(200))) == {200}
        service.send_signal(signal.SIGTERM)
        assert service.wait(PATIENCE_S) == 0
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
    assert collector.totals() == {"requests": 201}, log.read_text()[-2000:]
