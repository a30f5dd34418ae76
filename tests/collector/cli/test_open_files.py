"""`tallymark serve` where it may open few files, and where it has run out of them."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from tallymark_collector.receivers.accepting import TELL_INTERVAL
from tests.collector.cli.test_receiving import WAIT, post, total, until, usage
from tests.support.collector import running

SOFT, HARD = 60, 320
PLACES = 80
"""What these leave for connections over either protocol."""


def silent(opened: ExitStack, port: int, count: int) -> list[socket.socket]:
    """Strangers who connect and say nothing."""
    return [opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT)) for _ in range(count)]


def hear_the_end(client: socket.socket) -> None:
    """Returns once the server has closed the connection."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1000):
            pass


@pytest.mark.engines("embedded")
def test_strangers_at_both_ports_leave_files_for_everything_else(dsn: str) -> None:
    limited = ["sh", "-c", f'ulimit -Sn {SOFT} && ulimit -Hn {HARD} && exec "$@"', "sh", sys.executable]
    serve = ["-m", "tallymark_collector", "serve", "--port", "0", "--json", "--database", dsn]
    with (
        ExitStack() as opened,
        subprocess.Popen([*limited, *serve], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            channel = opened.enter_context(grpc.insecure_channel(f"127.0.0.1:{ready['port']}"))
            export = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
            export(usage(1), timeout=WAIT)
            over_http = silent(opened, ready["http_port"], 300)
            over_grpc = silent(opened, ready["port"], 150)
            for client in (*over_http[:-PLACES], *over_grpc[PLACES:]):
                hear_the_end(client)
            assert psutil.Process(process.pid).num_fds() <= HARD - 60
            assert post(ready["http_port"], usage(2)) == 200
            export(usage(4), timeout=WAIT)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    [line] = err.splitlines()
    assert f"may open {HARD} files, which is room for {PLACES} connections over HTTP, not 1000" in line
    assert total(dsn) == 7


@pytest.mark.engines("embedded")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of another process are set on Linux alone")
def test_a_process_without_files_says_so_in_a_line_and_goes_on_when_it_has_some(dsn: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(dsn, log=log) as collector, ExitStack() as opened:
        assert collector.process is not None
        assert post(collector.http_port, usage(1)) == 200
        pid = collector.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 5, before[1]))
        began = time.monotonic()
        silent(opened, collector.http_port, 50)
        until(lambda: "connections cannot be accepted (Too many open files)" in log.read_text())
        time.sleep(3)  # asyncio tries again after a second; only a wrong server makes more of it
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert post(collector.http_port, usage(2)) == 200
        text = log.read_text()
        assert "Traceback" not in text
        assert text.count("cannot be accepted") <= 1 + (time.monotonic() - began) / TELL_INTERVAL, text
    assert total(dsn) == 3
