"""SIGKILL of the collector at any moment: what clients send again is billed once, what they sent is billed."""

from __future__ import annotations

import os
import random
import threading
import time

import grpc
import psycopg
import pytest

from tests.support.collector import running
from tests.support.usage import SECOND, number, request, sum_metric

METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
REQUESTS = 60
CLIENTS = 3
KILLS = 8


def bodies(client: int, rng: random.Random) -> tuple[list[bytes], int]:
    """Requests whose points are all different, of delta and cumulative streams, and the sum of what they count."""
    now = time.time_ns() // SECOND * SECOND
    found, total = [], 0
    for i in range(REQUESTS):
        end = now - (REQUESTS - i) * SECOND
        deltas = [
            number(end - SECOND, end, rng.randint(1, 9), {"tallymark.account.id": f"account-{a}"})
            for a in rng.sample(range(40), 20)
        ]
        total += sum(point.as_int for point in deltas)
        running_total = number(now - 3600 * SECOND, end, 5 * (i + 1), {"tallymark.account.id": "counter"})
        message = request(
            sum_metric(deltas), sum_metric([running_total], name="jobs", temporality=2), producer=f"client-{client}"
        )
        found.append(message.SerializeToString())
    return found, total + 5 * REQUESTS


def send(port: int, requests: list[bytes], deadline: float, failures: list[str], patience: float = 5) -> None:
    """Sends each request until it is acknowledged, as an OpenTelemetry client does."""
    with grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
    ) as channel:
        call = channel.unary_unary(METHOD)
        for body in requests:
            while True:
                try:
                    answer = call(body, timeout=patience)
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                        failures.append(f"{error.code()}: {error.details()}")
                        return
                    if time.monotonic() > deadline:
                        failures.append("no answer in time")
                        return
                    time.sleep(0.02)
                else:
                    if answer:
                        failures.append(f"refused: {answer!r}")
                    break


@pytest.mark.parametrize("seed", [int(os.environ.get("TALLYMARK_TEST_SEED", "1")), 2])
def test_what_was_sent_is_billed_once(dsn: str, seed: int) -> None:
    rng = random.Random(seed)
    work = [bodies(client, rng) for client in range(CLIENTS)]
    failures: list[str] = []
    deadline = time.monotonic() + 150
    with running(dsn) as collector:
        threads = [
            threading.Thread(target=send, args=(collector.port, requests, deadline, failures)) for requests, _ in work
        ]
        for thread in threads:
            thread.start()
        kills = 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(rng.uniform(0.01, 0.3))
            if kills < KILLS:
                collector.kill()
                kills += 1
                collector.start()
        for thread in threads:
            thread.join()
    assert not failures, f"seed {seed}: {failures[:3]}"
    assert kills > 0, f"seed {seed}: everything was sent before the first kill"
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        row = connection.execute("SELECT sum(quantity) FROM usage_hourly").fetchone()
        assert row == (sum(total for _, total in work),), f"seed {seed}, {kills} kills"
        assert connection.execute("SELECT count(*) FROM usage_quarantine").fetchone() == (0,)
