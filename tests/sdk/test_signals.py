"""A signal's handler runs in the main thread, wherever that is: what it calls must not wait for what it interrupts."""

from __future__ import annotations

from typing import Any

import pytest

BEGIN = """
    import faulthandler, os, signal, sys, threading
    faulthandler.dump_traceback_later(100, exit=True)
    import tallymark
    from tallymark import assembly, exporting, journal, recovery, runtime

    answers, interrupted = [], []

    def handler(*_):
        answers.append(tallymark.{action}(60))
        if {exits}:
            sys.exit(0)

    signal.signal(signal.SIGUSR1, handler)

    def interrupt():
        if not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGUSR1)

    def running():
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("tallymark-"))

    tallymark.identify(account="acme")
"""

NEXT = """
    import tallymark
    tallymark.configure()
    tallymark.identify(account="acme")
    tallymark.record("calls", 2)
    assert tallymark.shutdown(60)
"""

START = """
    whole = threading.Thread.start

    def start(thread):
        if thread.name == "{thread}" and "{moment}" == "before":
            interrupt()
        whole(thread)
        if thread.name == "{thread}" and "{moment}" == "after":
            interrupt()

    tallymark.configure(interval=86_400)
    threading.Thread.start = start
    tallymark.record("calls")
    threading.Thread.start = whole
    assert answers == [True], answers
    tallymark.configure(interval=86_400)
    tallymark.record("calls", 2)
    assert tallymark.flush(60)
    assert running() == ["tallymark-exporter", "tallymark-sender"], running()
"""


@pytest.mark.parametrize("action", ["flush", "shutdown"])
@pytest.mark.parametrize("thread", ["tallymark-exporter", "tallymark-sender"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_handler_in_the_midst_of_the_threads_start(
    collector: Any, run_script: Any, action: str, thread: str, moment: str
) -> None:
    script = BEGIN.format(action=action, exits=False) + START.format(thread=thread, moment=moment)
    done = run_script(script, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}


@pytest.mark.parametrize("thread", ["tallymark-exporter", "tallymark-sender"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_handler_that_ends_the_process_in_the_midst_of_the_threads_start(
    collector: Any, run_script: Any, thread: str, moment: str
) -> None:
    script = BEGIN.format(action="shutdown", exits=True) + START.format(thread=thread, moment=moment)
    done = run_script(script + "    os._exit(3)\n", TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 1}


CONFIGURE = """
    tallymark.record("calls")
    owner, name = {owner}, "{name}"
    whole = getattr(owner, name)

    def instead(*args, **kwargs):
        if "{moment}" == "before":
            interrupt()
        found = whole(*args, **kwargs)
        if "{moment}" == "after":
            interrupt()
        return found

    setattr(owner, name, instead)
    tallymark.configure(interval=86_400)
    setattr(owner, name, whole)
    if "{action}" == "shutdown":
        assert runtime.active.settings is runtime.active.exporter is None, "it was done at configure()'s end"
        assert running() == [], running()
        tallymark.configure(interval=86_400)
    tallymark.record("calls", 2)
    assert tallymark.flush(60)
    assert running() == ["tallymark-exporter", "tallymark-sender"], running()
"""

MOMENTS = [
    ("assembly", "make_resource", "before"),
    ("assembly", "UsageExporter", "after"),
    ("journal.Journal", "open", "before"),
    ("journal.Journal", "open", "after"),
    ("exporting.UsageExporter", "start", "before"),
    ("exporting.UsageExporter", "start", "after"),
    ("recovery.Recovery", "tell_of_other_credentials", "after"),
]


@pytest.mark.parametrize("action", ["flush", "shutdown"])
@pytest.mark.parametrize(("owner", "name", "moment"), MOMENTS)
def test_a_handler_in_the_midst_of_configure(
    collector: Any, run_script: Any, action: str, owner: str, name: str, moment: str
) -> None:
    given = {"owner": owner, "name": name, "moment": moment, "action": action}
    script = BEGIN.format(action=action, exits=False) + CONFIGURE.format(**given)
    done = run_script(script, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}


@pytest.mark.parametrize(("owner", "name", "moment"), MOMENTS[3:])
def test_a_handler_that_ends_the_process_in_the_midst_of_configure(
    collector: Any, run_script: Any, owner: str, name: str, moment: str
) -> None:
    """What was recorded is delivered, or is on the disk for the next process."""
    given = {"owner": owner, "name": name, "moment": moment, "action": "shutdown"}
    script = BEGIN.format(action="shutdown", exits=True) + CONFIGURE.format(**given) + "    os._exit(3)\n"
    done = run_script(script, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    done = run_script(NEXT, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}


def test_a_handler_may_not_configure_in_the_midst_of_configure(collector: Any, run_script: Any) -> None:
    done = run_script(
        BEGIN.format(action="flush", exits=False)
        + """
    whole = assembly.make_resource

    def instead(attributes):
        try:
            tallymark.configure()
        except tallymark.SettingsError as error:
            print(error)
        return whole(attributes)

    assembly.make_resource = instead
    tallymark.configure()
    tallymark.record("calls")
    assert tallymark.flush(60)
""",
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert "in the midst of another" in done.stdout
    assert collector.totals() == {"calls": 1}


CUT = """
    owner, name = {owner}, "{name}"
    whole = getattr(owner, name)

    def instead(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            interrupt()
        return whole(*args, **kwargs)

    tallymark.configure(interval=86_400)
    exporting.UsageExporter.start = lambda *args, **kwargs: False  # as at the interpreter's end
    tallymark.record("calls")
    setattr(owner, name, instead)
    tallymark.flush(60)
    assert len(answers) == 1
"""


@pytest.mark.parametrize("action", ["flush", "shutdown"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("journal.Journal", "cut"),
        ("journal.Journal", "note_end"),
        ("assembly.Outbox", "_count"),
        ("assembly.Outbox", "_forget"),
        ("assembly.Delivery", "_deliver"),
    ],
)
def test_a_handler_in_the_midst_of_a_cut_or_of_sending(
    collector: Any, run_script: Any, action: str, owner: str, name: str
) -> None:
    """Where the main thread does both by itself. What is shut down in the midst of it is left to the next process."""
    ends = "    assert tallymark.shutdown(60)\n" if name == "note_end" else ""
    script = BEGIN.format(action=action, exits=False) + CUT.format(owner=owner, name=name).replace(
        "    assert len", f"{ends}    assert len"
    )
    done = run_script(script, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    done = run_script(NEXT, TALLYMARK_ENDPOINT=collector.endpoint)
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}


def test_a_fork_soon_after_shutdown_waits_for_what_is_left_of_the_connection(collector: Any, run_script: Any) -> None:
    """gRPC's threads are ending yet: whatever lock they hold nobody would release in the child."""
    done = run_script(
        """
        import os
        import tallymark
        from tallymark import delivery

        waits = []
        whole = delivery.wait_for_threads
        delivery.wait_for_threads = lambda patience_s: (waits.append(patience_s), whole(patience_s))

        def fork():
            pid = os.fork()
            if not pid:
                tallymark.configure()
                tallymark.record("calls")
                os._exit(0 if tallymark.flush(60) else 1)
            assert os.waitpid(pid, 0)[1] == 0

        tallymark.configure()
        tallymark.identify(account="acme")
        tallymark.record("calls")
        assert tallymark.shutdown(60)
        assert waits == []
        fork()
        assert waits == [delivery.GRPC_PATIENCE_S], waits
        fork()
        assert waits == [delivery.GRPC_PATIENCE_S], "there is nothing left"
        """,
        TALLYMARK_ENDPOINT=collector.endpoint,
    )
    assert done.returncode == 0, done.stderr
    assert collector.totals() == {"calls": 3}
