"""Servers that handle no signal: what they deliver at their end with the documented lines, and without them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.sdk.fake_collector import FakeCollector
from tests.sdk.integrations.clients import PATIENCE_S

SERVERS = {
    "waitress": """
        import waitress
        server = waitress.create_server(lambda environ, start: [], host="127.0.0.1", port=0)
        def run():
            server.run()
        """,
    "werkzeug": """
        from werkzeug.serving import make_server
        server = make_server("127.0.0.1", 0, lambda environ, start: [])
        def run():
            server.serve_forever()
        """,
    "grpc": """
        from concurrent.futures import ThreadPoolExecutor
        import grpc
        server = grpc.server(ThreadPoolExecutor(2))
        server.add_insecure_port("127.0.0.1:0")
        def run():
            server.start()
            server.wait_for_termination()
        """,
}


def documented() -> str:
    section = Path("docs/frameworks.md").read_text(encoding="utf-8").split("\n## How a process ends", 1)[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.mark.parametrize("with_lines", [True, False])
@pytest.mark.parametrize("name", SERVERS)
def test_sigterm(collector: FakeCollector, state_dir: Path, tmp_path: Path, name: str, with_lines: bool) -> None:
    source = f"""
import threading, time, tallymark
{documented() if with_lines else ""}
{textwrap.dedent(SERVERS[name])}
tallymark.configure(interval=3600, shutdown_timeout=60)
tallymark.record("calls", 3)
threading.Timer(0.2, print, ["up"], dict(flush=True)).start()
run()
"""
    environ = {**os.environ, "TALLYMARK_ENDPOINT": collector.endpoint, "TALLYMARK_STATE_DIR": str(state_dir)}
    service = subprocess.Popen([sys.executable, "-c", source], env=environ, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    with service.stdout:
        try:
            assert service.stdout.readline() == "up\n"
            service.send_signal(signal.SIGTERM)
            assert service.wait(PATIENCE_S) == (0 if with_lines else -signal.SIGTERM)
        finally:
            service.kill()
            service.wait()
    assert collector.totals() == ({"calls": 3} if with_lines else {})
