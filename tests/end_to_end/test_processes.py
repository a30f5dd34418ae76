"""Children say why they did not start, and are gone when they were told to go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tallymark_collector.demo.processes import Child, ChildError, clean_environment

READY = "print('ready on 17', flush=True)"
WAITS = "import time; time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def child(folder: Path, *statements: str) -> Child:
    return Child("helper", [sys.executable, "-c", "\n".join(statements)], clean_environment(), folder / "helper.log")


def test_a_child_is_ready_when_its_log_says_so(tmp_path: Path) -> None:
    helper = child(tmp_path, READY, WAITS)
    try:
        assert helper.wait_for(r"ready on (\d+)")[1] == "17"
        helper.check()
    finally:
        helper.stop()
    helper.stop()
    with pytest.raises(ChildError, match="ended with status -15"):
        helper.check()


def test_a_child_that_ends_early_is_quoted(tmp_path: Path) -> None:
    helper = child(tmp_path, "raise SystemExit('the port is taken')")
    with pytest.raises(ChildError, match=r"(?s)helper ended with status 1 before .*the port is taken"):
        helper.wait_for("ready")


def test_a_child_that_says_nothing_is_not_waited_for_forever(tmp_path: Path) -> None:
    helper = child(tmp_path, "print('hm', flush=True)", WAITS)
    try:
        helper.wait_for("hm")
        with pytest.raises(ChildError, match=r"(?s)not ready within 0.5 s.*hm"):
            helper.wait_for("ready", timeout=0.5)
    finally:
        helper.stop()


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    helper = child(tmp_path, DEAF, READY, WAITS)
    helper.wait_for("ready")
    with pytest.raises(ChildError, match="did not stop"):
        helper.stop(timeout=0.2)
    with pytest.raises(ChildError, match="status -9"):
        helper.check()


def test_settings_of_the_surroundings_do_not_reach_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYMARK_DISABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:4317")
    monkeypatch.setenv("KEPT", "yes")
    environment = clean_environment(TALLYMARK_ENDPOINT="http://here:1")
    assert environment["KEPT"] == "yes"
    assert {name for name in environment if name.startswith(("OTEL_", "TALLYMARK_"))} == {"TALLYMARK_ENDPOINT"}
