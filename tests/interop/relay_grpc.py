"""A gRPC server between clients and the collector, behind a wire that can be cut: what passes goes into the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tests.delivery.faults.wire import Wire
from tests.interop.fates import Fate, Seeded
from tests.interop.ledger import Ledger

PATIENCE_S = 30.0
_SERVICES = {"MetricsService": "metrics", "TraceService": "traces", "LogsService": "logs"}


class GrpcRelay(grpc.GenericRpcHandler):
    """Runs from its making to `close`."""

    def __init__(self, target: int, fates: Seeded) -> None:
        self.ledger = Ledger()
        self.fates = fates
        self.problems: list[str] = []
        self._channel = grpc.insecure_channel(f"127.0.0.1:{target}")
        self._threads = ThreadPoolExecutor(16)
        self._server = grpc.server(self._threads, handlers=(self,), options=[("grpc.so_reuseport", 0)])
        inner = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._wire = Wire(inner, 0, 0)
        self.port = self._wire.port

    def close(self) -> None:
        """Also what nobody waits for any more is handed on before: a client may have given up on a late request."""
        self._wire.close()
        self._server.stop(None).wait()
        self._threads.shutdown(wait=True)
        self._channel.close()
        assert not self.problems

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """gRPC asks who takes a call: this does, all of them."""
        method = details.method
        signal = _SERVICES.get(method.split("/")[1].rsplit(".", 1)[-1], "")
        forward = self._channel.unary_unary(method)

        def export(body: bytes, context: grpc.ServicerContext) -> bytes:
            return self._relay(signal, body, context, forward)

        return grpc.unary_unary_rpc_method_handler(export)

    def _relay(self, signal: str, body: bytes, context: Any, forward: Callable[..., Any]) -> bytes:
        fate = self.fates.of(signal, body)
        if fate is Fate.LATE:
            time.sleep(self.fates.delay())
        answer = b""
        if fate not in (Fate.REFUSED, Fate.CUT):
            try:
                answer = forward(body, timeout=PATIENCE_S)
            except grpc.RpcError as error:
                context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
                context.abort(error.code(), error.details())
            try:
                self.ledger.take(signal, body)
            except Exception as error:
                self.problems.append(repr(error))
                raise
        if fate in (Fate.CUT, Fate.CUT_AFTER):
            gone = threading.Event()
            if context.add_callback(gone.set):  # not where another's fate has cut it already
                self._wire.go_away(True)
                self._wire.go_away(False)
                # An answer now could still find its way.
                if not gone.wait(PATIENCE_S):
                    self.problems.append("a connection was not cut")
        elif fate in (Fate.REFUSED, Fate.LOST):
            if self.fates.says_when():
                context.set_trailing_metadata(_retry_at_once())
            context.abort(grpc.StatusCode.UNAVAILABLE, fate.value)
        return answer


def _retry_at_once() -> tuple[tuple[str, bytes], ...]:
    info = RetryInfo(retry_delay=Duration(nanos=50_000_000))
    status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="as the test wants it")
    status.details.add().Pack(info)
    return (
        ("google.rpc.retryinfo-bin", info.SerializeToString()),
        ("grpc-status-details-bin", status.SerializeToString()),
    )
