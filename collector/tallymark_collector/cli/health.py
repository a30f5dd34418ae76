"""`tallymark health`: what a container's health check runs. It asks over gRPC, as a client would; it needs no token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, NamedTuple

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tallymark_collector.cli import output
from tallymark_collector.cli.serve import address
from tallymark_collector.errors import UserError
from tallymark_collector.settings import DEFAULT_PORT

SERVING: Final = "serving"
_TIMEOUT: Final = 2.0
"""Seconds that a collector has to say how it is."""


AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar="TALLYMARK_HEALTH_TLS_CA",
        metavar="FILE",
        show_default="no TLS",
        help="Ask over TLS; the server's certificate must be from these authorities, PEM.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--tls-name",
        envvar="TALLYMARK_HEALTH_TLS_NAME",
        metavar="NAME",
        show_default="the host",
        help="The name in the server's certificate.",
    ),
]
ClientCertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--client-cert",
        envvar="TALLYMARK_HEALTH_CLIENT_CERT",
        metavar="FILE",
        show_default="none",
        help="A certificate to show, where the server asks for one (serve --tls-client-ca), PEM.",
    ),
]
ClientKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--client-key", envvar="TALLYMARK_HEALTH_CLIENT_KEY", metavar="FILE", show_default="none", help="Its key, PEM."
    ),
]


class Tls(NamedTuple):
    """How a collector is asked over TLS; without an authority it is asked without TLS."""

    authority: Path | None = None
    name: str | None = None
    certificate: Path | None = None
    key: Path | None = None

    def channel(self, endpoint: str) -> grpc.Channel:
        """Raises UserError where a file cannot be read."""
        options = [("grpc.enable_http_proxy", 0)]
        if self.authority is None:
            if self.name or self.certificate or self.key:
                raise UserError("--tls-name, --client-cert and --client-key go with --tls-ca: give that too")
            return grpc.insecure_channel(endpoint, options=options)
        if (self.certificate is None) != (self.key is None):
            raise UserError("--client-cert and --client-key come together: give both")
        try:
            authority, key, certificate = (
                None if path is None else path.read_bytes() for path in (self.authority, self.key, self.certificate)
            )
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        named = [("grpc.ssl_target_name_override", self.name)] if self.name else []
        return grpc.secure_channel(
            endpoint, grpc.ssl_channel_credentials(authority, key, certificate), options=[*options, *named]
        )


PLAIN: Final = Tls()


def health(
    host: Annotated[str, typer.Option(help="Where the collector listens.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="TALLYMARK_PORT", min=1, max=65535, help="The port that it listens on.")
    ] = DEFAULT_PORT,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for its answer.")] = _TIMEOUT,
    tls_ca: AuthorityOption = None,
    tls_name: NameOption = None,
    client_cert: ClientCertificateOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Ask a collector whether it takes usage, for health checks: exit status 0 if it does, else 1."""
    endpoint = f"{address(host)}:{port}"
    state = state_of(endpoint, timeout, Tls(tls_ca, tls_name, client_cert, client_key))
    output.say(f"{endpoint} {state}")
    if state != SERVING:
        raise typer.Exit(1)


def state_of(endpoint: str, timeout: float = _TIMEOUT, tls: Tls = PLAIN) -> str:
    """What a collector says about itself. That none answers is an answer too. Raises UserError."""
    with tls.channel(endpoint) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            code = getattr(error, "code", lambda: None)()
            return "does not say (no health service)" if code is grpc.StatusCode.UNIMPLEMENTED else "not reachable"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)).lower().replace("_", " ")
