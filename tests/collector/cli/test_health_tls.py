"""`tallymark serve` with TLS as a process, and `health` and `status` that ask it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import trustme

from tests.collector.cli.conftest import program
from tests.collector.cli.test_serve import serving


def test_health_over_tls_and_with_a_client_certificate(dsn: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    for name, pem in {
        "ca.pem": authority.cert_pem,
        "server.key": (server := authority.issue_cert("collector.example")).private_key_pem,
        "server.crt": server.cert_chain_pems[0],
        "probe.key": (probe := authority.issue_cert("probe.example")).private_key_pem,
        "probe.crt": probe.cert_chain_pems[0],
    }.items():
        (tmp_path / name).write_bytes(pem.bytes())
    files = {name: str(tmp_path / name) for name in ("ca.pem", "server.key", "server.crt", "probe.key", "probe.crt")}
    tls = ["--tls-cert", files["server.crt"], "--tls-key", files["server.key"], "--tls-client-ca", files["ca.pem"]]
    with serving(dsn, "--json", *tls) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["tls"], ready["anonymous"]) == (True, False), "who asks for certificates lets nobody in without"
        shown = ["--client-cert", files["probe.crt"], "--client-key", files["probe.key"]]
        trust = ["--tls-ca", files["ca.pem"], "--tls-name", "collector.example"]
        health = ["health", "--port", str(ready["port"]), "--timeout", "30"]
        asked = program(*health, *trust, *shown)
        assert (asked.returncode, asked.stdout) == (0, f"127.0.0.1:{ready['port']} serving\n"), asked.stderr
        endpoint = ["status", "--json", "--endpoint", f"127.0.0.1:{ready['port']}", "--database", dsn]
        state = json.loads(program(*endpoint, *trust, *shown).stdout)
        assert state["collector"]["state"] == "serving"
        health[-1] = "2"
        for less in ([], trust, [*trust[:2], *shown]):
            assert program(*health, *less).returncode == 1
        assert "come together" in program(*health, *trust, *shown[:2]).stderr
        assert "go with --tls-ca" in program(*health, *shown).stderr
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "BEGIN" not in err
