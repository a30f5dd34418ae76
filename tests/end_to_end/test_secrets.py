"""Canaries: a token, a database's password and a private key go through everything that can refuse them, and are then
looked for in everything that was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import quote

import grpc
import psycopg
import pytest
import trustme
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc

from tallymark_collector.access import tokens
from tallymark_collector.cli.redaction import redact
from tests.collector.cli.conftest import invoke, program
from tests.collector.cli.test_serve import serving
from tests.support.usage import BASE, SECOND, number, request, sum_metric

SERVICE = """
import sys, tallymark
tallymark.configure(interval=0.2, shutdown_timeout=float(sys.argv[1]))
with tallymark.identify(account="acme"):
    tallymark.record("api.requests")
tallymark.flush(float(sys.argv[1]))
tallymark.shutdown()
"""


def written(folder: Path) -> str:
    """Every file and every name below a folder."""
    found = [str(path) for path in folder.rglob("*")]
    found += [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    return "\n".join(found)


def dumped(dsn: str) -> str:
    """Everything that the database holds, binary columns as text and as hexadecimal digits."""
    with psycopg.connect(dsn, options="-c search_path=tallymark -c bytea_output=escape") as connection:
        names = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'tallymark'::regnamespace AND relkind = 'r'"
        ).fetchall()
        rows = [connection.execute(f"SELECT t::text FROM {name} t").fetchall() for (name,) in names]  # type: ignore[arg-type]
    return repr(rows)


def service(folder: Path, port: int, headers: str, patience: str = "60") -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TALLYMARK_"))}
    environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_HEADERS": headers,
        "OTEL_SERVICE_NAME": "shop",
        "TALLYMARK_STATE_DIR": str(folder),
        "no_grpc_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, patience], env=environ, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.engines("embedded")
def test_a_token_is_written_nowhere(dsn: str, tmp_path: Path) -> None:
    run = partial(invoke, database=dsn)
    create = ["tokens", "create", "--json", "--tenant", "acme-corp", "--scope"]
    good, reads, ended = (json.loads(run(*create, scope).stdout)["token"] for scope in ("write", "read", "write"))
    unknown = tokens.make().text
    canaries = [good, reads, ended, unknown]
    said = run("tokens", "revoke", ended)
    everything = [said.stdout, said.stderr]
    password = "Basic aHVudGVyMjpodW50ZXIy"
    with serving(dsn) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().split(":")[1].split()[0])
        everything.append(service(tmp_path / "good", port, f"authorization=Bearer%20{good}"))
        for number_, token in enumerate((reads, ended, unknown, good.swapcase())):
            headers = f"authorization=Bearer%20{token}"
            everything.append(service(tmp_path / f"bad{number_}", port, headers, "0.5"))
        everything.append(service(tmp_path / "basic", port, f"authorization={quote(password)}", "0.5"))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
            body = request(sum_metric([number(BASE, BASE + SECOND, 1, {"tallymark.account.id": "acme"})]))
            for pairs in ([good, good], [f"Bearer {good}"] * 2, [f"Bearer {good} x"]):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Export(body, metadata=[("authorization", pair) for pair in pairs])
                everything.append(repr(caught.value))
        process.terminate()
        _, err = process.communicate(timeout=60)
        everything.append(err)
    for command in (["tokens", "list"], ["tokens", "list", "--json"], ["status", "--json"], ["usage"], ["audit"]):
        shown = run(*command, "--tenant", "acme-corp")
        everything += [shown.stdout, shown.stderr]
    stored = dumped(dsn)
    assert "acme" in stored, "the good one was let in"
    everything += [stored, written(tmp_path)]
    text = "\n".join(everything)
    assert "shop" in text
    for token in canaries:
        assert token[17:60] not in text
        assert token.swapcase()[17:60] not in text
        assert token[17:60].encode().hex() not in text
    assert "aHVudGVyMjpodW50ZXIy" not in text


@pytest.mark.engines("embedded")
def test_a_private_key_and_a_password_are_in_no_error(dsn: str, tmp_path: Path) -> None:
    pair = trustme.CA().issue_cert("localhost")
    key, certificate = tmp_path / "key.pem", tmp_path / "crt.pem"
    key.write_bytes(pair.private_key_pem.bytes())
    certificate.write_bytes(trustme.CA().issue_cert("localhost").cert_chain_pems[0].bytes())
    secret = pair.private_key_pem.bytes().decode().splitlines()[1]
    away = "postgresql://me:hunter2-canary@127.0.0.1:1/usage"
    said = [
        program("serve", "--database", dsn, "--port", "0", "--tls-cert", str(first), "--tls-key", str(second))
        for first, second in ((certificate, key), (key, key), (key, certificate))
    ]
    for command in (
        ["serve", "--port", "0"],
        ["tokens", "create", "--tenant", "a", "--scope", "write"],
        ["tokens", "list"],
        ["tenants", "set", "a"],
    ):
        said.append(program(*command, "--database", away))
    for result in said:
        assert result.returncode == 2
        assert secret not in result.stdout + result.stderr
        assert "hunter2-canary" not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_a_token_that_gets_into_a_line_of_the_log_is_hidden_there() -> None:
    text = tokens.make().text
    for line in (
        text,
        f"metadata=(('authorization', 'Bearer {text}'),)",
        f"x={text}&y",
        f"{text[:40]}",
        f"{text}{text}",
    ):
        assert text[17:40] not in redact(line)
    assert text[:16] in redact(f"token {text} was refused"), "its public name stays"
    assert redact("authorization: Bearer aHVudGVyMjpodW50ZXIy") == "authorization: Bearer ***"
    assert redact(f"the token {text[:16]} is revoked") == f"the token {text[:16]} is revoked"
