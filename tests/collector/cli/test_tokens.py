"""`tallymark tokens` and `tallymark tenants`: made, shown once, listed, revoked."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from tallymark_collector.access import tokens
from tests.collector.cli.conftest import Run

FORM = re.compile(r"tmk_[0-9a-z]{12}_[0-9A-Za-z]{49}")


def rows(dsn: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT * FROM tallymark.credential").fetchall()


def create(run: Run, *more: str) -> dict[str, Any]:
    result = run("tokens", "create", "--tenant", "acme-corp", "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_a_token_is_shown_once_and_stored_nowhere(run: Run, dsn: str) -> None:
    result = run("tokens", "create", "--tenant", "acme-corp", "--scope", "write", "--note", "the shop")
    assert result.exit_code == 0
    assert FORM.fullmatch(result.stdout.strip()), "stdout is the token and nothing else"
    assert "acme-corp is a new tenant" in result.stderr
    assert "not shown again" in result.stderr
    token = tokens.read(result.stdout.strip())
    assert token is not None
    assert token.text not in result.stderr
    [row] = rows(dsn)
    assert token.verifier() in row
    assert token.text[17:60] not in repr(row)
    shown = run("tokens", "list").stdout + run("tokens", "list", "--json").stdout
    assert token.text[:16] in shown
    assert "the shop" in shown
    assert token.text[17:] not in shown
    assert token.verifier().hex() not in shown


def test_expiry_and_revocation(run: Run, dsn: str) -> None:
    before = datetime.now(timezone.utc)
    made = create(run, "--scope", "read-account", "--account", "Müller & Co", "--expires", "90d")
    expires = datetime.fromisoformat(made["expires"].replace("Z", "+00:00"))
    assert before + timedelta(days=90) <= expires <= datetime.now(timezone.utc) + timedelta(days=90)
    assert (made["state"], made["account"], made["scopes"]) == ("live", "Müller & Co", ["read-account"])
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE tallymark.credential SET expires_at = now()")
    assert json.loads(run("tokens", "list", "--json").stdout)[0]["state"] == "expired"
    for said in ("is revoked: collectors refuse it within 10 s", "had been revoked before"):
        result = run("tokens", "revoke", made["credential"])
        assert (result.exit_code, said in result.stdout) == (0, True)
    first = rows(dsn)[0][-1]
    assert run("tokens", "revoke", made["token"]).exit_code == 0, "who has only the token can end it too"
    assert rows(dsn)[0][-1] == first, "when it ended stays"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scope", "read-account"], "an account goes with the scope"),
        (["--scope", "write", "--account", "a"], "an account goes with the scope"),
        (["--scope", "read-account", "--account", ""], "an account has 1 to 256 characters"),
        (["--scope", "read-account", "--scope", "write", "--account", "a"], "stands alone"),
        (["--scope", "Write"], "--scope"),
        (["--scope", "write", "--expires", "soon"], "--expires 'soon'"),
        (["--scope", "write", "--expires", "0d"], "--expires '0d'"),
        (["--scope", "write", "--expires", "9999w"], "3660 days at most"),
        (["--scope", "write", "--tenant", "Acme-Corp"], "is no name of a tenant"),
        (["--scope", "write", "--tenant", "acme corp"], "is no name of a tenant"),
        (["--scope", "write", "--tenant", "\u0430cme"], "is no name of a tenant"),
        (["--scope", "write", "--client-cert", "cn:shop"], "a client certificate is named by"),
        (["--scope", "write", "--client-cert", "dns:*.example"], "a client certificate is named by"),
    ],
)
def test_what_makes_no_sense_is_a_sentence_and_makes_nothing(
    run: Run, dsn: str, arguments: list[str], sentence: str
) -> None:
    result = run("tokens", "create", "--tenant", "acme-corp", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert rows(dsn) == []
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT tenant FROM tallymark.tenant").fetchall() == [("default",)]


def test_a_token_that_is_pasted_where_it_does_not_belong_is_not_repeated(run: Run, dsn: str) -> None:
    text = tokens.make().text
    slip = text[:-1] + ("0" if text[-1] != "0" else "1")
    for arguments in (
        ["tokens", "create", "--tenant", "acme-corp", "--scope", "write", "--note", text],
        ["tokens", "create", "--tenant", text, "--scope", "write"],
        ["tokens", "revoke", text],
        ["tokens", "revoke", slip],
        ["usage", "--tenant", text],
        ["tenants", "set", text],
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert text[17:59] not in result.stdout + result.stderr
    assert text[17:59] not in repr(rows(dsn))


def test_certificates_are_trusted_once(run: Run) -> None:
    digest = "AB:" * 31 + "AB"
    made = create(run, "--scope", "write", "--client-cert", f"sha256:{digest}")
    assert (made["kind"], made["token"], made["certificate"]) == ("certificate", None, "sha256:" + "ab" * 32)
    create(run, "--scope", "write", "--client-cert", "uri:spiffe://acme.example/shop")
    again = run("tokens", "create", "--tenant", "globex", "--scope", "write", "--client-cert", f"sha256:{digest}")
    assert again.exit_code == 2
    assert "is trusted already" in again.stderr
    assert run("tokens", "revoke", made["credential"]).exit_code == 0
    create(run, "--scope", "write", "--client-cert", f"sha256:{digest}")


def test_limits_of_tenants(run: Run) -> None:
    result = run("tenants", "set", "acme-corp", "--points-per-second", "1000")
    assert "acme-corp is a new tenant" in result.stderr
    assert "points_per_second 1000, new_streams_per_hour default" in result.stdout
    run("tenants", "set", "acme-corp", "--new-streams-per-hour", "unlimited")
    assert json.loads(run("tenants", "list", "--json").stdout) == [
        {"tenant": "acme-corp", "points_per_second": 1000.0, "new_streams_per_hour": "unlimited"},
        {"tenant": "default", "points_per_second": None, "new_streams_per_hour": None},
    ]
    run("tenants", "set", "acme-corp", "--points-per-second", "default")
    assert "default" in run("tenants", "list").stdout
    for text in ("0", "-1", "nan", "inf", "many", ""):
        refused = run("tenants", "set", "acme-corp", "--points-per-second", text)
        assert (refused.exit_code, "is no limit" in refused.stderr) == (2, True)
