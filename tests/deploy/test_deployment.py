"""What the containers run, run without them: the database's roles, the migration as owner, the collector as writer, as
an ordinary user whose folders cannot be written."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tallymark_collector.model import Batch
from tallymark_collector.store import Store
from tallymark_collector.store.roles import AccountReader
from tests.deploy.conftest import DEPLOY, Server, make_roles
from tests.deploy.test_files import SERVICES
from tests.support.usage import point, stream

PASSWORDS = {"owner": 'it\'s \\ "quoted"', "writer": "w $(id) `id` ", "reader": "réader:%@/"}
SYSTEM_PYTHON = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
# Under root's home nobody else may run anything.
PYTHON = SYSTEM_PYTHON if sys.base_prefix.startswith("/root/") and SYSTEM_PYTHON.exists() else Path(sys.executable)
PROGRAM = [str(PYTHON), "-m", "tallymark_collector"]
PEOPLE = [f"tallymark_{name}" for name in PASSWORDS]


@pytest.fixture
def deployed(own_server: Server) -> Server:
    """A server whose roles have been made, and which asks them for their passwords."""
    secrets = own_server.folder / "secrets"
    secrets.mkdir()
    for name, password in PASSWORDS.items():
        (secrets / f"{name}_password").write_text(f"{password}\n")
    for _ in range(2):
        done = make_roles(own_server, secrets)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), "again is fine"
    rules = own_server.data / "pg_hba.conf"
    rules.write_text(f"local all {','.join(PEOPLE)} scram-sha-256\n{rules.read_text()}")
    own_server.execute("SELECT pg_reload_conf()")
    return own_server


def as_container(server: Server, name: str) -> dict[str, Any]:
    """Command, environment, user and folder of a service as `compose.yaml` gives them, with this server's socket."""
    service = SERVICES[name]
    host = Server.environment(server.dsn)["PGHOST"]
    environment = {
        key: value.replace("host=database", f"host={host}").replace("/run/secrets", str(server.folder / "secrets"))
        for key, value in service["environment"].items()
    }
    closed = server.folder / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o555)
    (server.folder / "tmp").mkdir(exist_ok=True)
    (server.folder / "tmp").chmod(0o777)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        number = int(service["user"].split(":")[0])
        user = {"user": number, "group": number, "extra_groups": []}
    return {
        "args": [*PROGRAM, *service["command"]],
        "env": {
            **environment,
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "TMPDIR": str(server.folder / "tmp"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path and not path.startswith(sys.base_prefix)),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        "cwd": closed,
        "text": True,
        **user,
    }


def run(options: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
    options = {**options, "args": [*options["args"], *more]}
    return subprocess.run(**options, capture_output=True, check=False, timeout=90)


@contextmanager
def serving(options: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    options = {**options, "args": [*options["args"], "--port", "0", "--json"]}
    with subprocess.Popen(**options, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield process, json.loads(line)["port"]
        finally:
            process.kill()


@pytest.fixture
def _readable_by_others(own_server: Server) -> None:
    options = as_container(own_server, "collector")
    try:
        seen = run({**options, "args": [PROGRAM[0], "-c", "import tallymark_collector.cli.app"]})
        reason = "".join(seen.stderr.splitlines()[-1:])
    except PermissionError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"Python or this copy of the project cannot be read by another user: {reason}")


@pytest.mark.usefixtures("_readable_by_others")
def test_the_services_in_the_order_of_the_compose_file(deployed: Server) -> None:
    collector, migrate = as_container(deployed, "collector"), as_container(deployed, "migrate")

    early = run(collector, "--port", "0")
    assert (early.returncode, early.stdout) == (2, "")
    assert "run `tallymark migrate --writer tallymark_writer`" in early.stderr

    for _ in range(2):
        done = run(migrate)
        assert done.returncode == 0, done.stderr
    closed = run(collector, "--port", "0")
    assert (closed.returncode, closed.stdout) == (2, ""), "it listens for other containers, and there is no token yet"
    assert "tallymark tokens create" in closed.stderr
    create = ["tokens", "create", "--tenant", "default", "--scope", "write"]
    made = run({**migrate, "args": [*PROGRAM, *create]})
    assert (made.returncode, made.stdout[:4]) == (0, "tmk_"), made.stderr

    with serving(collector) as (process, port):
        asked = run({**collector, "args": [*PROGRAM, "health", "--port", str(port), "--timeout", "30"]})
        assert (asked.returncode, asked.stdout) == (0, f"127.0.0.1:{port} serving\n")
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert not any(password.strip() in err for password in PASSWORDS.values())
    assert [*(deployed.folder / "closed").iterdir()] == []

    reader = deployed.to(user="tallymark_reader", password=PASSWORDS["reader"], dbname="tallymark")
    with psycopg.connect(reader, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM tallymark.usage_hourly").fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT FROM tallymark.usage_point")


@pytest.mark.usefixtures("_readable_by_others")
def test_a_wrong_password_is_a_sentence(deployed: Server) -> None:
    (deployed.folder / "secrets/writer_password").write_text("wrong-one\n")
    refused = run(as_container(deployed, "collector"), "--port", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "password authentication failed" in refused.stderr
    assert "wrong-one" not in refused.stderr


def test_the_roles_are_no_more_than_they_say(deployed: Server) -> None:
    rows = deployed.execute(
        "SELECT rolname, rolcanlogin, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,"
        " rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname LIKE 'tallymark%' ORDER BY 1"
    )
    assert rows == [(name, True, False, True) for name in sorted(PEOPLE)]
    assert deployed.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'tallymark'") == [
        ("tallymark_owner",)
    ]
    deployed.execute("CREATE ROLE somebody LOGIN")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        deployed.execute("SELECT 1", user="somebody", dbname="tallymark")


@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_secret_stops_before_anything_is_made(own_server: Server, content: str | None) -> None:
    secrets = own_server.folder / "secrets"
    secrets.mkdir()
    for name in ("owner", "writer"):
        (secrets / f"{name}_password").write_text("x\n")
    if content is not None:
        (secrets / "reader_password").write_text(content)
    done = make_roles(own_server, secrets)
    assert done.returncode == 1
    assert b"reader_password is missing, empty or cannot be read by" in done.stderr
    assert own_server.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'tallymark%'") == []


def test_an_account_reads_its_own_usage_as_the_page_says(deployed: Server) -> None:
    owner = deployed.to(user="tallymark_owner", password=PASSWORDS["owner"], dbname="tallymark")
    page = (DEPLOY.parent / "docs/operating.md").read_text()
    [statements] = [block for block in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if "acme_reader" in block]
    for statement in re.sub("--.*", "", statements).split(";")[:-1]:
        deployed.execute(statement)

    async def write() -> None:
        store = Store(owner)
        await store.open()
        await store.prepare()
        await store.write(Batch(points=[point(stream("acme"), 0, 10, 5), point(stream("globex"), 0, 10, 7)]))
        await store.write(Batch(points=[point(stream("acme", tenant="other-tenant"), 0, 10, 11)]))
        await store.grant(account_reader=AccountReader("acme_reader", "default", "acme"))
        await store.close()

    asyncio.run(write())
    mine = {"user": "acme_reader", "password": "…", "dbname": "tallymark"}
    assert deployed.execute("SELECT meter, quantity FROM tallymark.own_usage_hourly", **mine) == [("api.requests", 5)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        deployed.execute("SELECT 1 FROM tallymark.usage_hourly", **mine)
