"""What the fault runs came to, at the end of the tests."""

from __future__ import annotations

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in ("tests.delivery.test_faults", "test_faults"):
        module = sys.modules.get(name)
        if module is not None and module.results:
            from tests.delivery.faults.table import table

            terminalreporter.section(f"faults, seed {module.SEED}")
            for line in table(module.results):
                terminalreporter.write_line(line)
            return
