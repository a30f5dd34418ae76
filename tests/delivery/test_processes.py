"""Several processes at one port: load over both protocols while a child is killed, who gets it, and how all end."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.collector.cli.conftest import program
from tests.delivery.test_killed_collector import bodies, send
from tests.support.usage import SECOND, number, request, sum_metric

PATIENCE = 90
"""Seconds that nothing here takes, on any machine."""


class Parent:
    """`serve --processes`, its ready line, and what it and its children say."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.ready = json.loads(process.stdout.readline())

    @property
    def admin_ports(self) -> list[int]:
        return [self.ready["admin_port"], *(child["admin_port"] for child in self.ready["processes"])]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@contextmanager
def serving(dsn: str, *more: str, count: int = 2) -> Iterator[Parent]:
    command = [sys.executable, "-m", "tallymark_collector", "serve", "--database", dsn, "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, "--processes", str(count), "--admin-port", "0", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Parent(process)
        finally:
            process.kill()  # without effect where it has ended; its children end with it


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(port: int, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(ask(port, "/metrics")[1])
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def until(what: Any, why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def restarted(parent: Parent, times: int) -> None:
    """Returns once children have been started again so often."""
    name = "tallymark_collector_process_restarts_total"
    until(lambda: metric(parent.ready["admin_port"], name) == times, "it is not started again")


def post(port: int, messages: list[bytes], deadline: float, failures: list[str], patience: float = 5) -> None:
    """Sends each request over a new HTTP connection until it is acknowledged."""
    for body in messages:
        while True:
            try:
                asked = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/metrics", body, {"Content-Type": "application/x-protobuf"}
                )
                with urllib.request.urlopen(asked, timeout=patience):
                    break
            except urllib.error.HTTPError as error:
                if error.code not in (429, 502, 503, 504):
                    failures.append(f"{error.code}: {error.read()!r}")
                    return
            except (OSError, http.client.HTTPException):
                pass  # refused, reset or cut off in the middle
            if time.monotonic() > deadline:
                failures.append("no answer in time")
                return
            time.sleep(0.02)


@pytest.mark.engines("embedded")
def test_totals_are_exact_while_a_child_is_killed_under_load(dsn: str) -> None:
    rng = random.Random(20261122)
    failures: list[str] = []
    with serving(dsn) as parent:
        port, http_port = parent.ready["port"], parent.ready["http_port"]
        assert {child["pid"] for child in parent.ready["processes"]} == {child.pid for child in parent.children()}
        deadline = time.monotonic() + PATIENCE
        loads = [bodies(client, rng) for client in range(4)]
        ways = [(send, port), (send, port), (post, http_port), (post, http_port)]
        threads = [
            threading.Thread(target=way, args=(to, load, deadline, failures))
            for (way, to), (load, _) in zip(ways, loads, strict=True)
        ]
        for thread in threads:
            thread.start()
        killed = 0
        while any(thread.is_alive() for thread in threads):
            if killed < 3:
                time.sleep(rng.uniform(0.1, 0.5))
                victim = rng.choice(parent.children())
                os.kill(victim.pid, signal.SIGKILL)
                killed += 1
                restarted(parent, killed)
            else:
                for thread in threads:
                    thread.join(0.1)
        assert failures == []
        until(
            lambda: metric(parent.ready["admin_port"], "tallymark_collector_processes", tallymark_state="serving") == 2,
            "not all serve again",
        )
        assert ask(parent.ready["admin_port"], "/readyz") == (200, "ready\n")
        parent.process.send_signal(signal.SIGTERM)
        _, err = parent.process.communicate(timeout=PATIENCE)
    assert parent.process.returncode == 0, err
    assert err.count("status -9: another in") == killed, "all may have been sent before the third"
    assert killed >= 1
    with psycopg.connect(dsn) as connection:
        [stored] = connection.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() or [None]
    assert stored == sum(total for _, total in loads)


@pytest.mark.engines("embedded")
def test_connections_are_spread_and_each_process_counts_its_own(dsn: str) -> None:
    now = time.time_ns() // SECOND * SECOND
    sent = 60
    messages = [
        request(sum_metric([number(now - (n + 2) * SECOND, now - (n + 1) * SECOND, 1, {"tallymark.account.id": "a"})]))
        for n in range(2 * sent)
    ]
    with serving(dsn) as parent:
        failures: list[str] = []
        deadline = time.monotonic() + PATIENCE
        # Each over a connection of its own, and none a second time because the first took long: they are counted.
        for message in messages[:sent]:
            send(parent.ready["port"], [message.SerializeToString()], deadline, failures, PATIENCE)
        post(parent.ready["http_port"], [m.SerializeToString() for m in messages[sent:]], deadline, failures, PATIENCE)
        assert failures == []
        name = "tallymark_collector_requests_total"
        own, *children = parent.admin_ports
        for protocol in ("grpc", "http"):
            counts = [metric(port, name, tallymark_protocol=protocol) for port in children]
            assert sum(counts) == sent
            # A process gets none of 60 with a probability of 2 to the power of -59, where the kernel is fair.
            assert min(counts) > 0
        assert metric(own, name) == 0
        assert metric(own, "tallymark_collector_processes", tallymark_state="serving") == 2
        # Hours are made again by the parent alone.
        assert "tallymark_collector_refresh_lag_seconds" in ask(own, "/metrics")[1]
        assert not any("tallymark_collector_refresh_lag_seconds" in ask(port, "/metrics")[1] for port in children)
        with psycopg.connect(dsn) as connection:
            until(
                lambda: connection.execute("SELECT FROM tallymark.usage_dirty").rowcount == 0 or connection.rollback(),
                "nobody makes hours again",
            )
            row = connection.execute("SELECT sum(quantity) FROM tallymark.usage_hour").fetchone()
        assert row == (2 * sent,)


@pytest.mark.engines("embedded")
def test_nobody_else_gets_the_ports_and_a_killed_parent_leaves_no_children(dsn: str) -> None:
    with serving(dsn) as parent:
        children = parent.children()
        for more in ([], ["--processes", "2"]):
            second = program("serve", "--port", str(parent.ready["port"]), "--no-http", "--database", dsn, *more)
            assert (second.returncode, second.stdout) == (2, "")
            assert second.stderr.count("\n") == 1, second.stderr
            assert f"error: cannot listen on 127.0.0.1:{parent.ready['port']}: is another" in second.stderr
            second = program(
                *("serve", "--port", "0", "--http-port", str(parent.ready["http_port"]), "--database", dsn), *more
            )
            assert second.returncode == 2
            assert f"cannot listen on 127.0.0.1:{parent.ready['http_port']}: is another" in second.stderr
        parent.process.kill()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE)
        assert alive == []


@pytest.mark.engines("embedded")
@pytest.mark.parametrize("count", [1, 2])
def test_not_ready_at_once_when_told_to_end_and_requests_under_way_are_finished(dsn: str, count: int) -> None:
    now = time.time_ns()
    message = request(sum_metric([number(now - SECOND, now, 7, {"tallymark.account.id": "a"})])).SerializeToString()
    failures: list[str] = []
    with serving(dsn, count=count) as parent:
        admin = parent.ready["admin_port"]
        assert ask(admin, "/readyz") == (200, "ready\n")
        with psycopg.connect(dsn) as holder:
            holder.execute("LOCK TABLE tallymark.usage_point IN ACCESS EXCLUSIVE MODE")
            sending = threading.Thread(
                # With all the patience: one that hangs up and comes again finds nobody who listens.
                target=post,
                args=(parent.ready["http_port"], [message], time.monotonic() + PATIENCE, failures, PATIENCE),
            )
            sending.start()
            with psycopg.connect(dsn, autocommit=True) as watcher:
                until(
                    lambda: (
                        watcher.execute(
                            "SELECT FROM pg_locks WHERE NOT granted AND relation = 'tallymark.usage_point'::regclass"
                        ).rowcount
                    ),
                    "the request does not come to the lock",
                )
            parent.process.send_signal(signal.SIGTERM)
            until(lambda: ask(admin, "/readyz") == (503, "the collector is stopping\n"), "ready for ever")
            assert ask(admin, "/livez")[0] == 200
            assert sending.is_alive()
            holder.rollback()
        sending.join(PATIENCE)
        _, err = parent.process.communicate(timeout=PATIENCE)
    assert (parent.process.returncode, failures) == (0, []), err
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT sum(quantity) FROM tallymark.usage_point").fetchone() == (7,)


@pytest.mark.engines("embedded")
def test_what_stops_a_child_from_starting_is_the_sentence_of_the_whole(dsn: str, tmp_path: Any) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "cert.pem")]
    done = program("serve", "--port", "0", "--processes", "2", "--database", dsn, *files)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: " in done.stderr
    assert "cert.pem" in done.stderr
    assert "Traceback" not in done.stderr
