"""A collector that takes everything and keeps nothing, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Final

import grpc

METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


class _Export(grpc.GenericRpcHandler):
    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if call.method != METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


def main() -> None:
    """Serves until its standard input ends; prints its port."""
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 64 * 2**20)])
    server.add_generic_rpc_handlers([_Export()])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


@contextmanager
def sink() -> Iterator[str]:
    """Its endpoint."""
    command = [sys.executable, "-m", "benchmarks.sink"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.communicate()


if __name__ == "__main__":
    main()
