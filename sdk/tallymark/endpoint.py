"""Where usage is sent and how: Tallymark's settings over OpenTelemetry's variables, with OpenTelemetry's meaning.

A gRPC channel is made here and nowhere else, and gRPC imported no earlier than it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from tallymark.otlp_variables import is_insecure, read_otlp_variables
from tallymark.settings import Settings
from tallymark.variables import Reader

if TYPE_CHECKING:
    import grpc

DEFAULT_ENDPOINT: Final = "http://localhost:4317"
DEFAULT_TIMEOUT_S: Final = 10.0
_PORTS: Final = {"http": 80, "https": 443}


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
        """Host and port, as gRPC takes them: without a port it would take 443, also for http."""
        parts = urlsplit(self.url)
        if parts.scheme not in _PORTS or not parts.netloc:
            return self.url
        return parts.netloc if parts.port else f"{parts.netloc.rstrip(':')}:{_PORTS[parts.scheme]}"

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
    """A setting that is given counts, then OpenTelemetry's variables, which `configure()` has checked."""
    variables = read_otlp_variables(Reader(environ), settings)
    url = settings.endpoint or variables.endpoint or DEFAULT_ENDPOINT
    return Endpoint(
        url=url,
        insecure=is_insecure(url, settings.insecure, variables.insecure),
        headers=variables.headers if settings.headers is None else settings.headers,
        timeout_s=settings.timeout_s or variables.timeout_s or DEFAULT_TIMEOUT_S,
        compression=variables.compression or "none",
        certificate=variables.certificate,
        client_certificate=variables.client_certificate,
        client_key=variables.client_key,
    )


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
