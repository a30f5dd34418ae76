"""Options of what an operator sees: ports, and where the collector's own metrics go, never to itself."""

from __future__ import annotations

import pytest

from tallymark_collector.cli import observing
from tallymark_collector.errors import UserError
from tallymark_collector.settings import Settings, Telemetry
from tests.collector.cli.conftest import Run

OTLP = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://gateway:4317"}


def test_the_admin_port_is_asked_for_or_follows_from_the_other() -> None:
    def port(given: int | None = None, off: bool = False, grpc: int = 4317, http: int | None = 4318) -> int | None:
        return observing.admin_port(given, off=off, port=grpc, http_port=http)

    assert (port(), port(9000), port(0), port(off=True)) == (4319, 9000, 0, None)
    assert (port(grpc=0, http=0), port(grpc=5317), port(0, grpc=0)) == (0, 0, 0)
    for wrong in ({"given": 4317}, {"given": 4318}, {"given": 1, "off": True}):
        with pytest.raises(UserError, match="--admin-port"):
            port(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "environ", "telemetry"),
    [
        (None, {}, None),
        (None, OTLP, Telemetry("grpc")),
        (None, OTLP | {"OTEL_METRICS_EXPORTER": "none"}, None),
        (None, OTLP | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, Telemetry("http")),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, Telemetry("grpc")),
        ("grpc://gateway:4317", OTLP, Telemetry("grpc", "http://gateway:4317")),
        ("grpcs://gateway:4317", {}, Telemetry("grpc", "https://gateway:4317")),
        ("http://gateway", {}, Telemetry("http", "http://gateway/v1/metrics")),
        ("https://gateway/otlp/", {}, Telemetry("http", "https://gateway/otlp/v1/metrics")),
        ("https://gateway/otlp/v1/metrics", {}, Telemetry("http", "https://gateway/otlp/v1/metrics")),
    ],
)
def test_where_metrics_go(given: str | None, environ: dict[str, str], telemetry: Telemetry | None) -> None:
    assert observing.telemetry(given, environ) == telemetry


@pytest.mark.parametrize(
    ("given", "environ"),
    [
        ("gateway:4317", {}),
        ("grpc://gateway", {}),
        ("http://me:hunter2@gateway", {}),
        ("http://gateway:99999", {}),
        ("http://", {}),
        (None, OTLP | {"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"}),
    ],
)
def test_what_is_no_endpoint_is_a_sentence_without_it(given: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        observing.telemetry(given, environ)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "environ"),
    [
        ("grpc://localhost:4317", {}),
        ("http://127.0.0.1:4318", {}),
        ("http://127.1.2.3:4318/v1/metrics", {}),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317"}),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "localhost:4317"}),
    ],
)
def test_never_to_itself(given: str | None, environ: dict[str, str]) -> None:
    settings = Settings("unused", port=4317, http_port=4318, telemetry=observing.telemetry(given, environ))
    with pytest.raises(UserError, match="is this collector itself"):
        observing.check_own(settings, environ)


@pytest.mark.parametrize("given", ["grpc://localhost:4320", "http://localhost", "grpc://192.0.2.1:4317", None])
def test_to_others_it_may(given: str | None) -> None:
    settings = Settings("unused", port=4317, http_port=4318, telemetry=observing.telemetry(given, {}))
    observing.check_own(settings, {})


def test_serve_refuses_before_it_does_anything(offline: Run) -> None:
    itself = offline("serve", "--telemetry-endpoint", "http://localhost:4318")
    assert (itself.exit_code, itself.stdout) == (2, "")
    assert "--telemetry-endpoint is this collector itself (port 4318)" in itself.stderr
    for arguments, sentence in {
        (
            "--processes",
            "2",
            "--forward-to",
            "grpc://x:1",
            "--forward-dir",
            "/tmp/x",
        ): "--forward-to do not go together",
        ("--processes", "2", "--admin-port", "4316"): "OTLP has 4317",
        ("--no-admin", "--admin-port", "1"): "contradict each other",
    }.items():
        result = offline("serve", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert sentence in result.stderr
