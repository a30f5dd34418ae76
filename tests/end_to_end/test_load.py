"""The load is the same every time, skewed, and over when a request gets no answer."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from tallymark_collector.demo.directory import customers
from tallymark_collector.demo.load import LoadError, calls, drive


def test_the_same_calls_every_time() -> None:
    known = customers(20)
    assert list(calls(100, known)) == list(calls(100, known))
    assert list(calls(100, known)) != list(calls(100, known, seed=1))


def test_few_customers_make_most_of_the_calls() -> None:
    made = Counter(call.customer.account for call in calls(10_000, customers(200)))
    assert len(made) == 200, "everybody calls"
    assert sum(count for _, count in made.most_common(20)) > 5_000


def test_all_plans_and_endpoints_are_used() -> None:
    some = list(calls(1_000, customers(50)))
    assert {call.customer.plan for call in some} == {"starter", "growth", "scale"}
    assert {call.route for call in some} == {"/search", "/completions", "/files/{name}"}


async def test_a_request_without_an_answer_ends_the_load() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    answers: list[None] = []
    with pytest.raises(LoadError, match="no answer"):
        await drive(f"http://127.0.0.1:{port}", calls(10, customers(5)), lambda: answers.append(None))
    assert answers == []
