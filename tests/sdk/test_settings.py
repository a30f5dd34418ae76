from typing import Any

import pytest

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
