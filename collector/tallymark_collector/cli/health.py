"""`tallymark health`: what a container's health check runs. It asks over gRPC, as a client would."""

from __future__ import annotations

from typing import Annotated, Final

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tallymark_collector.cli import output
from tallymark_collector.cli.serve import address
from tallymark_collector.settings import DEFAULT_PORT

SERVING: Final = "serving"
_TIMEOUT: Final = 2.0
"""Seconds that a collector has to say how it is."""


def health(
    host: Annotated[str, typer.Option(help="Where the collector listens.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="TALLYMARK_PORT", min=1, max=65535, help="The port that it listens on.")
    ] = DEFAULT_PORT,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for its answer.")] = _TIMEOUT,
) -> None:
    """Ask a collector whether it takes usage, for health checks: exit status 0 if it does, else 1."""
    endpoint = f"{address(host)}:{port}"
    state = state_of(endpoint, timeout)
    output.say(f"{endpoint} {state}")
    if state != SERVING:
        raise typer.Exit(1)


def state_of(endpoint: str, timeout: float = _TIMEOUT) -> str:
    """What a collector says about itself. That none answers is an answer too."""
    with grpc.insecure_channel(endpoint, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            code = getattr(error, "code", lambda: None)()
            return "does not say (no health service)" if code is grpc.StatusCode.UNIMPLEMENTED else "not reachable"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)).lower().replace("_", " ")
