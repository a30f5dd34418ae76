"""Databases for the tests: the embedded PostgreSQL always, others where a connection string is given.

    --dsn-postgres DSN     or TALLYMARK_TEST_DSN_POSTGRES    a PostgreSQL that may be used: databases are made in it
    --dsn-timescale DSN    or TALLYMARK_TEST_DSN_TIMESCALE   the same with TimescaleDB, of either edition

Every test gets a new database, copied from one that has been migrated.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tallymark_collector.store import Store
from tallymark_collector.store.engines import connect_string

ENGINES = ("embedded", "postgres", "timescale")
TEMPLATE = f"tallymark_test_template_{os.getpid()}"
"""Of this run alone: others may use the same server."""
_versions: dict[str, str] = {}
STEPS = pytest.StashKey[dict[str, int]]()
"""Random steps after which everything was compared, by engine: see tests/conformance/test_random_upkeep.py."""
_numbers = itertools.count(1)


# How long an example takes says nothing of the code on a machine that is busy.
settings.register_profile("unhurried", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    for engine in ENGINES[1:]:
        parser.addoption(f"--dsn-{engine}", default=os.environ.get(f"TALLYMARK_TEST_DSN_{engine.upper()}"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STEPS] = {}
    config.addinivalue_line("markers", "engines(name, …): the test is about these engines alone")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("databases")
    for engine in ENGINES:
        if engine in _versions:
            steps = config.stash[STEPS].get(engine)
            counted = "" if steps is None else f"; {steps:,} random steps, each followed by a comparison of every view"
            terminalreporter.write_line(f"{engine}: {_versions[engine]}{counted}")
        elif engine != "embedded" and config.getoption(f"--dsn-{engine}") is None:
            terminalreporter.write_line(f"{engine}: NOT TESTED, no --dsn-{engine} given")


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="tallymark-test-") as folder,
        connect_string(f"embedded:{Path(folder) / 'pg'}") as dsn,
    ):
        yield dsn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever asks for a server runs on every engine that is there, or on those that `engines` marks it for; the
    summary names those that are not."""
    if "server" in metafunc.fixturenames:
        given = [engine for engine in ENGINES if engine == "embedded" or metafunc.config.getoption(f"--dsn-{engine}")]
        if marker := metafunc.definition.get_closest_marker("engines"):
            given = [engine for engine in given if engine in marker.args]
        metafunc.parametrize("server", given, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server's connection string, with a migrated template database in it; once for every engine."""
    engine = request.param
    if engine == "embedded":
        dsn = request.getfixturevalue("embedded_server")
    else:
        dsn = request.config.getoption(f"--dsn-{engine}")
    _prepare(engine, dsn)
    yield dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")


def _prepare(engine: str, dsn: str) -> None:
    template = make_conninfo(dsn, dbname=TEMPLATE)

    async def migrate() -> None:
        store = Store(template, wants_timescale=engine == "timescale")
        await store.open()
        await store.migrate()
        await store.close()

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
        asyncio.run(migrate())
        with psycopg.connect(template) as inside:
            _versions[engine] = _version(inside)
        # A database is copied only while nobody is in it, and TimescaleDB has a worker in each that lets it in.
        connection.execute(f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [TEMPLATE])


def _version(connection: psycopg.Connection) -> str:
    """The server, and TimescaleDB's version and edition where that is in use."""
    row = connection.execute(
        """SELECT split_part(version(), ' on ', 1), current_setting('timescaledb.license', true),
                  (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb')"""
    ).fetchone()
    assert row is not None
    server, license_, extension = row
    edition = {"apache": "Apache", "timescale": "community"}.get(license_, license_)
    return server if extension is None else f"{server}, TimescaleDB {extension}, {edition} edition"


@pytest.fixture
def dsn(server: str) -> Iterator[str]:
    """A new, migrated database."""
    name = sql.Identifier(f"tallymark_test_{os.getpid()}_{next(_numbers)}")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(TEMPLATE)))
        yield make_conninfo(server, dbname=name.as_string().strip('"'))
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def unmigrated(server: str) -> Iterator[str]:
    """A new database with nothing in it."""
    name = f"tallymark_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield make_conninfo(server, dbname=name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    """A store on a new database."""
    found = Store(dsn)
    await found.open()
    yield found
    await found.close()


@pytest.fixture
def event_loop_runner() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop for tests that are not coroutines themselves (Hypothesis calls them many times)."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def blocking_store(dsn: str, event_loop_runner: asyncio.AbstractEventLoop) -> Iterator[Store]:
    """A store on a new database, open in `event_loop_runner`."""
    found = Store(dsn)
    event_loop_runner.run_until_complete(found.open())
    yield found
    event_loop_runner.run_until_complete(found.close())
