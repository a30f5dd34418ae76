"""The end is told twice, by the server and by the interpreter: both together wait for one `shutdown_timeout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tallymark import record
from tallymark.assembly import Runtime
from tallymark.settings import Settings
from tests.sdk.integrations.clients import PATIENCE_S, eventually

SHORT_S = 0.1


@pytest.fixture
def short(settings: Callable[..., Settings], unused_port: int) -> Settings:
    return settings(f"http://127.0.0.1:{unused_port}", interval_s=86_400.0, shutdown_timeout_s=SHORT_S)


def given_at_the_end(runtime: Runtime) -> list[float]:
    """The seconds that the exporter is given when the process ends."""
    exporter = runtime.exporter
    assert exporter is not None
    given: list[float] = []
    shutdown = exporter.shutdown

    def noted(timeout_s: float) -> bool:
        given.append(timeout_s)
        return shutdown(timeout_s)

    exporter.shutdown = noted  # type: ignore[method-assign]
    runtime.end()
    return given


def test_what_has_waited_in_vain_does_not_wait_again(fresh: Runtime, short: Settings) -> None:
    fresh.configure(short)
    record("calls")
    fresh.flush(SHORT_S)
    eventually(lambda: len(fresh.outbox) == 1)
    assert not fresh.finish()
    assert given_at_the_end(fresh) == [0.0]
    assert fresh.undelivered() == {"calls": 1}


def test_an_end_that_nobody_told_before_has_all_the_time(fresh: Runtime, short: Settings) -> None:
    fresh.configure(short)
    record("calls")
    assert given_at_the_end(fresh) == [SHORT_S]


def test_usage_since_then_has_all_the_time(fresh: Runtime, short: Settings) -> None:
    fresh.configure(short)
    record("calls")
    assert not fresh.finish()
    record("calls", 2)
    assert given_at_the_end(fresh) == [SHORT_S]
    assert fresh.undelivered() == {"calls": 3}


def test_usage_since_then_that_is_in_the_outbox_has_all_the_time(fresh: Runtime, short: Settings) -> None:
    fresh.configure(short)
    record("calls")
    assert not fresh.finish()
    record("calls", 2)
    fresh.flush(SHORT_S)
    eventually(lambda: len(fresh.outbox) > 0 and not fresh.recorder)
    assert given_at_the_end(fresh) == [SHORT_S]


@pytest.mark.parametrize("stops", [True, False])
def test_a_service_that_configures_again_has_all_the_time(fresh: Runtime, short: Settings, stops: bool) -> None:
    fresh.configure(short)
    record("calls")
    assert not fresh.finish()
    if stops:
        fresh.shutdown(0.0)
    fresh.configure(short)
    assert given_at_the_end(fresh) == [SHORT_S]


def test_a_collector_that_answers_again_has_all_the_time(
    fresh: Runtime, short: Settings, start_collector: Callable[..., Any], unused_port: int
) -> None:
    fresh.configure(short)
    record("calls")
    assert not fresh.finish()
    collector = start_collector(port=unused_port)
    eventually(lambda: not fresh.undelivered())
    assert given_at_the_end(fresh) == [SHORT_S]
    assert collector.totals() == {"calls": 1}


def test_what_was_delivered_leaves_the_next_end_all_the_time(
    fresh: Runtime, settings: Callable[..., Settings], collector: Any
) -> None:
    fresh.configure(settings(collector.endpoint, interval_s=86_400.0, shutdown_timeout_s=PATIENCE_S))
    record("calls")
    assert fresh.finish()
    assert given_at_the_end(fresh) == [PATIENCE_S]


def test_the_process_ends_so(run_script: Callable[..., Any], unused_port: int) -> None:
    done = run_script(
        """
    import asyncio, time
    import tallymark
    from tallymark import runtime
    from tallymark.integrations.asgi import UsageMiddleware

    async def app(scope, receive, send):
        pass

    async def receive():
        return {"type": messages.pop()}

    async def send(message):
        print(message["type"])

    messages = ["lifespan.shutdown", "lifespan.startup"]
    tallymark.configure(shutdown_timeout=0.1, interval=3600)
    tallymark.record("calls")
    tallymark.flush(0.1)
    while not len(runtime.current().outbox):
        time.sleep(0.01)
    exporter = runtime.current().exporter
    shutdown = exporter.shutdown
    exporter.shutdown = lambda seconds: print("given", seconds) or shutdown(seconds)
    asyncio.run(UsageMiddleware(app)({"type": "lifespan"}, receive, send))
    """,
        TALLYMARK_ENDPOINT=f"http://127.0.0.1:{unused_port}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["lifespan.startup.complete", "lifespan.shutdown.complete", "given 0.0", ""]
    assert "the service ends with usage that no collector has acknowledged: calls=1" in done.stderr
