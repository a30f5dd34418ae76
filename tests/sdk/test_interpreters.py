"""Interpreters other than the one that everybody has."""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

import pytest

from tests.sdk.fake_collector import FakeCollector

SUBINTERPRETERS = """
    try:
        import _interpreters as interpreters
        kinds = ["legacy", "isolated"]
        create, run = interpreters.create, interpreters.exec
    except ImportError:
        import _xxsubinterpreters as interpreters
        kinds = [False, True]
        create, run = lambda isolated: interpreters.create(isolated=isolated), interpreters.run_string
"""


def test_a_subinterpreter_is_refused_and_the_main_one_goes_on(collector: FakeCollector, run_script: Any) -> None:
    pytest.importorskip("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    done = run_script(
        SUBINTERPRETERS
        + """
    import tallymark
    tallymark.configure()
    tallymark.record("calls", 1)
    for kind in kinds:
        one = create(kind)
        run(one, '''if True:
            try:
                import tallymark
                tallymark.configure()
            except (tallymark.SettingsError, ImportError) as error:
                print(error)
            else:
                print("configured")
            ''')
        interpreters.destroy(one)
    tallymark.record("calls", 2)
    assert tallymark.flush(60)
    """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert "configured" not in done.stdout.splitlines()
    assert done.stdout.count("cannot be configured in a subinterpreter") == 2, done.stdout
    assert collector.totals() == {"calls": 3}


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_threads_without_a_gil_count_each_call(collector: FakeCollector, run_script: Any) -> None:
    done = run_script(
        """
        import threading, tallymark
        tallymark.configure(interval=0.01)
        def work():
            for _ in range(20_000):
                tallymark.record("calls")
                tallymark.record("parts", 0.1)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert tallymark.flush(60)
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 160_000, "parts": 16_000}
