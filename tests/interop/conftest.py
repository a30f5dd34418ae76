"""A collector for the clients of other projects, and what was tested with which, at the end of the tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.interop import clients
from tests.interop.clients import NotBuiltError, Order, Running
from tests.interop.fates import Seeded
from tests.interop.relay_grpc import GrpcRelay
from tests.interop.relay_http import HttpRelay
from tests.support.collector import Collector, running

PAIRS = [(client, protocol) for client, protocols in clients.PROTOCOLS.items() for protocol in protocols]
Start = Callable[[str, Order], Running]

_tested: dict[str, dict[str, str]] = {}
_missing: dict[str, str] = {}
_numbers = itertools.count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (_tested or _missing):
        return
    terminalreporter.section("interop")
    for name in sorted({*_tested, *_missing}):
        if name in _tested:
            versions = ", ".join(f"{part} {version}" for part, version in sorted(_tested[name].items()))
            terminalreporter.write_line(f"{name}: {versions}")
        else:
            terminalreporter.write_line(f"{name}: NOT TESTED, {_missing[name]}")


@contextmanager
def own_collector(server: str, *more: str) -> Iterator[Collector]:
    """A collector's process on a new database of the server; `more` are further arguments of `serve`."""
    name = f"tallymark_interop_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    with running(make_conninfo(server, dbname=name), *more) as found:
        yield found


@pytest.fixture(scope="session")
def collector(embedded_server: str) -> Iterator[Collector]:
    """The collector that most tests share."""
    with own_collector(embedded_server) as found:
        yield found


@pytest.fixture
def prefix() -> str:
    """Names the accounts of one test: nobody else's usage is in its sums."""
    return f"i{next(_numbers)}"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a client; skips the test where it is not there. None outlives the test."""
    started: list[Running] = []

    def one(name: str, order: Order) -> Running:
        try:
            found = clients.start(name, order)
        except NotBuiltError as error:
            note_missing(name, str(error))
            pytest.skip(f"{name} NOT TESTED: {error}")
        started.append(found)
        return found

    yield one
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()
        if each.versions:
            note_tested(each.name, each.versions)


def note_tested(name: str, versions: dict[str, str]) -> None:
    """For the summary."""
    _tested.setdefault(name, {}).update(versions)


def note_missing(name: str, reason: str) -> None:
    """For the summary."""
    _missing[name] = reason


def port_of(collector: Collector, protocol: str) -> int:
    """Where the collector listens for the protocol."""
    return collector.port if protocol == "grpc" else collector.http_port


@contextmanager
def relay(port: int, protocol: str, fates: Seeded) -> Iterator[GrpcRelay | HttpRelay]:
    """A way to the collector's port on which requests meet their fates."""
    found = GrpcRelay(port, fates) if protocol == "grpc" else HttpRelay(port, fates)
    try:
        yield found
    finally:
        found.close()
