"""OpenTelemetry's variables for an exporter of OTLP, as far as they say where usage goes and how.

The source is OpenTelemetry's specification, "OTLP Exporter Configuration". A variable of the signal,
OTEL_EXPORTER_OTLP_METRICS_*, counts before the general one. Where Tallymark differs:

- OTEL_EXPORTER_OTLP_PROTOCOL: usage goes over gRPC alone. With http/protobuf or http/json these variables name an HTTP
  receiver, so an endpoint of Tallymark's own must be given; it is an error otherwise.
- OTEL_EXPORTER_OTLP_HEADERS go to the endpoint that these variables name, or to the default one. They are not sent to
  an endpoint that was given to Tallymark: they hold a credential for somebody else.
- OTEL_EXPORTER_OTLP_TIMEOUT is in seconds, as in all of OpenTelemetry for Python, not in milliseconds as specified.
- a value that the specification would have ignored with a warning is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from tallymark.variables import Headers, Reader

COMPRESSIONS: Final = ("none", "gzip", "deflate")
PROTOCOLS: Final = ("grpc", "http/protobuf", "http/json")

MAX_TIMEOUT_S: Final = 600.0
"""For one attempt. More is a value in milliseconds."""


class Given(Protocol):
    """What Tallymark's own settings say, None where nothing."""

    @property
    def endpoint(self) -> str | None: ...

    @property
    def insecure(self) -> bool | None: ...

    @property
    def headers(self) -> Headers | None: ...

    @property
    def timeout_s(self) -> float | None: ...


@dataclass(frozen=True)
class OtlpVariables:
    """What the variables say; None or empty where they say nothing."""

    endpoint: str | None
    insecure: bool | None
    headers: Headers = field(repr=False)
    timeout_s: float | None
    compression: str | None
    certificate: str | None
    client_certificate: str | None
    client_key: str | None


def read_otlp_variables(reader: Reader, given: Given) -> OtlpVariables:
    """What they say beside what was given. What is wrong with those that count is in the reader's problems."""
    return OtlpVariables(
        endpoint=_endpoint(reader) if given.endpoint is None else None,
        insecure=reader.truth("", None, _first(reader, "INSECURE")[0]),
        headers=_headers(reader) if given.endpoint is None and given.headers is None else (),
        timeout_s=_timeout(reader) if given.timeout_s is None else None,
        compression=_compression(reader),
        certificate=_first(reader, "CERTIFICATE")[1],
        client_certificate=_first(reader, "CLIENT_CERTIFICATE")[1],
        client_key=_first(reader, "CLIENT_KEY")[1],
    )


def check_otlp_variables(reader: Reader, given: Given) -> None:
    """As `read_otlp_variables`, for the problems alone; with the files that they name."""
    found = read_otlp_variables(reader, given)
    url = given.endpoint or found.endpoint
    if url and not is_insecure(url, given.insecure, found.insecure):
        _check_certificates(reader)


def is_insecure(url: str, given: bool | None, variable: bool | None) -> bool:
    """Whether an address is spoken to without TLS. `https` always has TLS; `http` has none, unless `insecure=False` was
    given to Tallymark; for other addresses the variable counts, and TLS where it says nothing."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme == "https":
        return False
    if given is not None:
        return given
    return scheme == "http" or bool(variable)


def _first(reader: Reader, name: str) -> tuple[str, str | None]:
    return reader.first(f"OTEL_EXPORTER_OTLP_METRICS_{name}", f"OTEL_EXPORTER_OTLP_{name}")


def _endpoint(reader: Reader) -> str | None:
    where, protocol = _first(reader, "PROTOCOL")
    protocol = (protocol or "grpc").lower()
    if protocol not in PROTOCOLS:
        reader.problem(where, protocol, f"must be one of {', '.join(PROTOCOLS)}")
    elif protocol != "grpc":
        reader.problem(
            where,
            protocol,
            "usage is sent over gRPC alone; name the collector's gRPC endpoint by TALLYMARK_ENDPOINT or endpoint=",
        )
        return None  # what is wrong with an address for HTTP is of no interest
    where, url = _first(reader, "ENDPOINT")
    return None if url is None else reader.address(where, url)


def _headers(reader: Reader) -> Headers:
    where, text = _first(reader, "HEADERS")
    return () if text is None else reader.headers(where, reader.pairs(where, text))


def _timeout(reader: Reader) -> float | None:
    return reader.seconds(
        "",
        None,
        _first(reader, "TIMEOUT")[0],
        at_most=MAX_TIMEOUT_S,
        why=" (OpenTelemetry for Python reads it in seconds; TALLYMARK_TIMEOUT counts before it)",
    )


def _compression(reader: Reader) -> str | None:
    where, text = _first(reader, "COMPRESSION")
    if text is not None and text.lower() not in COMPRESSIONS:
        reader.problem(where, text, f"must be one of {', '.join(COMPRESSIONS)}")
    return None if text is None else text.lower()


def _check_certificates(reader: Reader) -> None:
    """They are read when the first usage is sent, too late to tell anybody."""
    for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        where, path = _first(reader, name)
        if path is None:
            continue
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            reader.problem(where, path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        if b"-----BEGIN " not in content:
            reader.problem(where, path, "is not a file in PEM format")
    (where_certificate, certificate), (where_key, key) = (
        _first(reader, "CLIENT_CERTIFICATE"),
        _first(reader, "CLIENT_KEY"),
    )
    if (certificate is None) != (key is None):
        lacking = where_key if key is None else where_certificate
        reader.problems.append(f"{lacking}: is needed too: a client certificate and its key come together")
