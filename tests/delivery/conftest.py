"""What the runs came to, at the end of the tests."""

from __future__ import annotations

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in ("test_faults", "test_contract"):
        module = sys.modules.get(f"tests.delivery.{name}") or sys.modules.get(name)
        if not getattr(module, "results", None):
            continue
        if name == "test_faults":
            from tests.delivery.faults.table import table as lines_of
        else:
            from tests.delivery.contract.table import table as lines_of
        terminalreporter.section(f"{name.removeprefix('test_')}, seed {module.SEED}")
        for line in lines_of(module.results):
            terminalreporter.write_line(line)
