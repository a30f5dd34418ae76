"""Open files: how many connections they leave room for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tallymark_collector.processes.descriptors import RESERVE, fitted
from tallymark_collector.settings import Limits, Settings

HTTP = Settings("unused", http_port=0)


@pytest.mark.parametrize(
    ("limit", "over_http", "over_grpc"),
    [
        (1_048_576, 1000, 1_048_576 - RESERVE - 1000),
        (4096, 1000, 4096 - RESERVE - 1000),
        (RESERVE + 2000, 1000, 1000),
        (RESERVE + 1998, 999, 999),
        (1024, 384, 384),
        (500, 125, 125),
        (64, 16, 16),
    ],
)
def test_connections_get_what_the_reserve_leaves(limit: int, over_http: int, over_grpc: int) -> None:
    found, said = fitted(HTTP, limit)
    assert (found.limits.http_connections, found.connections.most) == (over_http, over_grpc)
    assert bool(said) == (over_http < Limits().http_connections)
    if said:
        assert f"may open {limit} files, which is room for {over_http} connections over HTTP, not 1000" in said
        assert f"and {over_grpc} over gRPC" in said


def test_without_http_all_of_it_is_grpcs() -> None:
    found, said = fitted(Settings("unused"), 1024)
    assert (found.connections.most, said) == (768, "")


@pytest.mark.parametrize(("soft", "hard"), [(100, 150), (120, 120)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int) -> None:
    program = (
        "import resource\n"
        "from tallymark_collector.processes.descriptors import raised\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "print(raised(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(hard)] * 3
