from pathlib import Path
from typing import Any

import pytest

from tallymark.endpoint import endpoint_of
from tallymark.errors import SettingsError
from tallymark.settings import Settings, make_settings


def test_defaults_leave_the_endpoint_to_the_exporter() -> None:
    assert make_settings(environ={}) == Settings(interval_s=10.0, shutdown_timeout_s=10.0)


def test_arguments_over_our_variables_over_opentelemetrys() -> None:
    environ = {
        "TALLYMARK_ENDPOINT": "https://a:1",
        "TALLYMARK_HEADERS": "Authorization=Bearer%20x, b=2",
        "TALLYMARK_INSECURE": "true",
        "TALLYMARK_TIMEOUT": "3",
        "TALLYMARK_DISABLED": "TRUE",
        "TALLYMARK_SHUTDOWN_TIMEOUT": "1.5",
        "OTEL_METRIC_EXPORT_INTERVAL": "2500",
        "TALLYMARK_STATE_DIR": "/var/lib/a",
    }
    assert make_settings(environ=environ) == Settings(
        endpoint="https://a:1",
        headers=(("authorization", "Bearer x"), ("b", "2")),
        insecure=True,
        timeout_s=3.0,
        interval_s=2.5,
        shutdown_timeout_s=1.5,
        disabled=True,
        state_dir="/var/lib/a",
    )
    assert make_settings(environ={**environ, "TALLYMARK_EXPORT_INTERVAL": "4"}).interval_s == 4.0
    given = make_settings(
        endpoint="http://b:2",
        headers={"X-Key": "k"},
        insecure=False,
        timeout=1,
        interval=2,
        disabled=False,
        environ=environ,
    )
    assert (given.endpoint, given.headers, given.insecure) == ("http://b:2", (("x-key", "k"),), False)
    assert (given.timeout_s, given.interval_s, given.disabled) == (1.0, 2.0, False)


def test_empty_variables_are_unset() -> None:
    assert make_settings(environ={"TALLYMARK_ENDPOINT": "", "TALLYMARK_TIMEOUT": " "}) == Settings()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        make_settings(
            endpoint="ftp://x",
            interval=-1,
            headers={"bad name": "x"},
            resource={"a": ""},
            environ={
                "TALLYMARK_DISABLED": "perhaps",
                "TALLYMARK_TIMEOUT": "soon",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "ten",
                "OTEL_EXPORTER_OTLP_COMPRESSION": "zip",
            },
        )
    message = str(caught.value)
    for part in (
        "endpoint",
        "interval",
        "bad name",
        "resource",
        "TALLYMARK_DISABLED",
        "TALLYMARK_TIMEOUT",
        "'ten'",
        "zip",
    ):
        assert part in message
    assert message.count("\n  - ") == 8


@pytest.mark.parametrize(
    "given",
    [
        {"endpoint": ""},
        {"endpoint": 7},
        {"endpoint": "http://"},
        {"endpoint": "http://a:notaport"},
        {"endpoint": "two words"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": True},
        {"interval": float("inf")},
        {"interval": "often"},
        {"insecure": "yes"},
        {"disabled": 1},
        {"headers": ["a"]},
        {"headers": {"a": 1}},
        {"headers": {"a": "line\nbreak"}},
        {"headers": {1: "a"}},
        {"resource": "a=b"},
        {"resource": {"a": 1}},
        {"state_dir": 7},
        {"state_dir": ""},
    ],
)
def test_arguments_that_cannot_work(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        make_settings(**given, environ={})


def test_credentials_are_not_shown() -> None:
    settings = make_settings(headers={"authorization": "Bearer secret"}, environ={})
    assert "secret" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        make_settings(headers={"authorization": "Bearer secret\n"}, environ={})
    assert "secret" not in str(caught.value)


def problems_of(environ: dict[str, str], **given: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        make_settings(**given, environ=environ)
    return str(caught.value).splitlines()[1:]


def test_problems_of_all_sources_are_told_at_once() -> None:
    found = problems_of(
        {
            "TALLYMARK_SHUTDOWN_TIMEOUT": "never",
            "TALLYMARK_BAGGAGE": "both",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "https://collector:port",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://fine:4317",
            "OTEL_EXPORTER_OTLP_HEADERS": "nothing",
            "OTEL_EXPORTER_OTLP_INSECURE": "maybe",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "10000",
            "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "zstd",
            "OTEL_METRIC_EXPORT_INTERVAL": "0",
            "OTEL_RESOURCE_ATTRIBUTES": "service.name=shop,owner",
            "OTEL_SERVICE_NAME": "shop\udcff",
        },
        resource={"": "x"},
        mirror="everything",
    )
    named = [line.removeprefix("  - ").split("=")[0].split(":")[0] for line in found]
    assert sorted(named) == sorted(
        [
            "TALLYMARK_BAGGAGE",
            "mirror",
            "TALLYMARK_SHUTDOWN_TIMEOUT",
            "OTEL_METRIC_EXPORT_INTERVAL",
            "resource",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            "OTEL_EXPORTER_OTLP_INSECURE",
            "OTEL_EXPORTER_OTLP_HEADERS",
            "OTEL_EXPORTER_OTLP_TIMEOUT",
            "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION",
            "OTEL_RESOURCE_ATTRIBUTES",
            "OTEL_SERVICE_NAME",
        ]
    )


def test_otlp_over_http_is_refused_where_its_endpoint_would_be_used() -> None:
    environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT": "https://in.example/otlp"}
    (found,) = problems_of(environ)
    assert "OTEL_EXPORTER_OTLP_PROTOCOL='http/protobuf': usage is sent over gRPC alone; name the collector's" in found
    assert "TALLYMARK_ENDPOINT" in found
    (found,) = problems_of({"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL='http/json'" in found
    (found,) = problems_of({"OTEL_EXPORTER_OTLP_PROTOCOL": "thrift"})
    assert "must be one of grpc, http/protobuf, http/json" in found
    make_settings(environ={**environ, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "GRPC", **HTTPS})
    own = make_settings(endpoint="http://own:4317", environ=environ)
    assert endpoint_of(own, environ).target == "own:4317"
    assert make_settings(environ={**environ, "TALLYMARK_DISABLED": "true"}).disabled


HTTPS = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4317"}


def test_headers_of_opentelemetrys_endpoint_go_to_no_other_one() -> None:
    environ = {**HTTPS, "OTEL_EXPORTER_OTLP_HEADERS": "Api-Key=of%20a%20vendor, b=x=y"}
    assert endpoint_of(make_settings(environ=environ), environ).headers == (("api-key", "of a vendor"), ("b", "x=y"))
    assert endpoint_of(make_settings(endpoint="http://own:1", environ=environ), environ).headers == ()
    assert endpoint_of(make_settings(headers={}, environ=environ), environ).headers == ()
    assert endpoint_of(make_settings(headers={"A": "1"}, environ=environ), environ).headers == (("a", "1"),)
    del environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert len(endpoint_of(make_settings(environ=environ), environ).headers) == 2
    (found,) = problems_of({"OTEL_EXPORTER_OTLP_HEADERS": "key=secret%0A"})
    assert "secret" not in found
    for name in ("grpc-timeout", "trace-bin", "Bad Name"):
        assert name in problems_of({}, headers={name: "x"})[0]


@pytest.mark.parametrize(
    ("url", "insecure", "variable", "want"),
    [
        ("http://c:1", None, None, ("c:1", True)),
        ("http://c:1", None, "false", ("c:1", True)),  # the scheme counts before the variable
        ("http://c:1", False, None, ("c:1", False)),
        ("https://c:1", None, "true", ("c:1", False)),
        ("https://c:1", True, None, ("c:1", False)),
        ("c:1", None, None, ("c:1", False)),
        ("c:1", None, "True", ("c:1", True)),
        ("c:1", True, "false", ("c:1", True)),
        ("http://c", None, None, ("c:80", True)),
        ("https://c/", None, None, ("c:443", False)),
        ("http://[::1]:4317", None, None, ("[::1]:4317", True)),
        ("http://[::1]", None, None, ("[::1]:80", True)),
        ("unix:/run/c.sock", True, None, ("unix:/run/c.sock", True)),
        ("dns:///c:4317", None, None, ("dns:///c:4317", False)),
    ],
)
def test_where_to_and_whether_by_tls(
    url: str, insecure: bool | None, variable: str | None, want: tuple[str, bool]
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "TALLYMARK_ENDPOINT"):
        environ = {name: url} | ({} if variable is None else {"OTEL_EXPORTER_OTLP_INSECURE": variable})
        found = endpoint_of(make_settings(insecure=insecure, environ=environ), environ)
        assert (found.target, found.insecure) == want


@pytest.mark.parametrize(
    "url",
    [
        "http://c:4318/v1/metrics",
        "https://c/otlp",
        "c:4317/x",
        "c:0",
        "c:99999",
        "unix:",
        ":4317",
        "ftp://c",
        "http:/c:1",
    ],
)
def test_addresses_that_cannot_work(url: str) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "TALLYMARK_ENDPOINT"):
        (found,) = problems_of({name: url})
        assert f"{name}='{url}'" in found


@pytest.mark.parametrize("url", ["http://user:secret@c:1", "http://u:secret@c:port", "secret@c:1"])
def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    (found,) = problems_of({"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    assert "secret" not in found


def test_certificates_are_looked_at_while_somebody_can_be_told(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    good.write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    bad.write_text("text")
    missing = str(tmp_path / "missing.pem")
    environ = {
        **HTTPS,
        "OTEL_EXPORTER_OTLP_CERTIFICATE": missing,
        "OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY": str(bad),
    }
    first, second, third = problems_of(environ)
    assert f"OTEL_EXPORTER_OTLP_CERTIFICATE='{missing}': cannot be read: No such file" in first
    assert f"OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY='{bad}': is not a file in PEM format" in second
    assert "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: is needed too" in third
    plain = {**environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
    make_settings(environ=plain)  # without TLS nobody reads them
    files = dict.fromkeys(("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"), str(good))
    environ = {**HTTPS, **{f"OTEL_EXPORTER_OTLP_{name}": path for name, path in files.items()}}
    found = endpoint_of(make_settings(environ=environ), environ)
    assert (found.certificate, found.client_certificate, found.client_key) == (str(good),) * 3


def test_our_time_out_counts_before_a_bad_one_of_opentelemetrys() -> None:
    environ = {"OTEL_EXPORTER_OTLP_TIMEOUT": "10000"}
    assert "in seconds" in problems_of(environ)[0]
    assert endpoint_of(make_settings(timeout=7, environ=environ), environ).timeout_s == 7.0
    assert endpoint_of(make_settings(environ={}), {"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "4.5"}).timeout_s == 4.5


@pytest.mark.parametrize(
    ("given", "variable", "sends", "accepts"),
    [
        (None, None, False, False),
        (True, None, True, True),
        (None, "1", True, True),
        ("send", "accept", True, False),
        (None, "Accept", False, True),
        (False, "true", False, False),
    ],
)
def test_each_side_of_baggage_has_its_own_switch(given: Any, variable: str | None, sends: bool, accepts: bool) -> None:
    found = make_settings(baggage=given, environ={} if variable is None else {"TALLYMARK_BAGGAGE": variable})
    assert (found.sends_baggage, found.accepts_baggage) == (sends, accepts)


def test_the_mirror_shows_accounts_where_that_is_asked_for() -> None:
    for given, want in ((None, (False, False)), (True, (True, False)), ("accounts", (True, True))):
        found = make_settings(mirror=given, environ={})
        assert (found.mirrors, found.mirrors_accounts) == want
    for bad in ("Accounts", 1, ["accounts"]):
        assert "mirror=" in problems_of({}, mirror=bad)[0]
    assert "must be true, false or send or accept" in problems_of({"TALLYMARK_BAGGAGE": "maybe"})[0]
