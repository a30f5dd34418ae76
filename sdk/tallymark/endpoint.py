"""Where usage is sent and how: Tallymark's settings over OpenTelemetry's variables, with OpenTelemetry's meaning.

A gRPC channel is made here and nowhere else, and gRPC imported no earlier than it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlparse

from opentelemetry.util.re import parse_env_headers

from tallymark.settings import Settings

if TYPE_CHECKING:
    import grpc

DEFAULT_ENDPOINT: Final = "http://localhost:4317"
DEFAULT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Endpoint:
    """What a channel is made of."""

    url: str
    insecure: bool
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    timeout_s: float
    compression: str
    certificate: str | None
    client_certificate: str | None
    client_key: str | None

    @property
    def target(self) -> str:
        """Host and port."""
        return urlparse(self.url).netloc or self.url

    def channel(self, options: tuple[tuple[str, str | int], ...]) -> grpc.Channel:
        """Raises OSError where a certificate cannot be read."""
        import grpc

        compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}.get(
            self.compression, grpc.Compression.NoCompression
        )
        if self.insecure:
            return grpc.insecure_channel(self.target, options=options, compression=compression)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(self.certificate),
            private_key=_read(self.client_key),
            certificate_chain=_read(self.client_certificate),
        )
        return grpc.secure_channel(self.target, credentials, options=options, compression=compression)


def endpoint_of(settings: Settings, environ: Mapping[str, str] = os.environ) -> Endpoint:
    """A setting that is given counts, then OTEL_EXPORTER_OTLP_METRICS_*, then OTEL_EXPORTER_OTLP_*."""

    def variable(name: str) -> str | None:
        for full in (f"OTEL_EXPORTER_OTLP_METRICS_{name}", f"OTEL_EXPORTER_OTLP_{name}"):
            if text := environ.get(full, "").strip():
                return text
        return None

    url = settings.endpoint or variable("ENDPOINT") or DEFAULT_ENDPOINT
    scheme = urlparse(url).scheme
    insecure = settings.insecure
    if scheme == "https":
        insecure = False
    elif insecure is None:
        text = variable("INSECURE")
        insecure = scheme == "http" if text is None else text.lower() == "true"
    headers = settings.headers
    if not headers and (text := variable("HEADERS")):
        headers = tuple(sorted(parse_env_headers(text, liberal=True).items()))
    return Endpoint(
        url=url,
        insecure=insecure,
        headers=headers,
        timeout_s=settings.timeout_s or float(variable("TIMEOUT") or DEFAULT_TIMEOUT_S),
        compression=(variable("COMPRESSION") or "none").lower(),
        certificate=variable("CERTIFICATE"),
        client_certificate=variable("CLIENT_CERTIFICATE"),
        client_key=variable("CLIENT_KEY"),
    )


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
