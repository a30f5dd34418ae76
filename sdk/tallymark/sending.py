"""One OTLP export over gRPC, on the bytes that stand in the outbox, and what its answer means.

OpenTelemetry's own exporter encodes anew at each attempt and gives back success or failure alone; which status it was,
how long the server wants to be left in peace, and which points it refused for good must be known here.
"""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from tallymark.endpoint import Endpoint

if TYPE_CHECKING:
    import grpc

METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
RETRY_INFO: Final = "google.rpc.retryinfo-bin"
STATUS_DETAILS: Final = "grpc-status-details-bin"
MAX_RETRY_INFO_S: Final = 300.0

# What says that the collector cannot be reached or cannot take anything now: no request would fare better.
_AWAY: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS", "RESOURCE_EXHAUSTED"}
)


_THREADS: Final = ("event_engine", "grpc_", "lifeguard", "default-execut", "resolver-execut")
"""How the names of gRPC's threads begin."""
_TASKS: Final = Path("/proc/self/task")
_LOOK_S: Final = 0.002
_UNSEEN_S: Final = 0.05
"""What is waited for threads that cannot be looked for, on systems without /proc."""


class Verdict(enum.Enum):
    """What became of a request."""

    ACKNOWLEDGED = enum.auto()
    AWAY = enum.auto()
    """Nothing can be delivered now; all is to be tried again."""
    NOT_NOW = enum.auto()
    """This request was not taken, for a reason that may go away (a credential, a fault in the server)."""
    TOO_LARGE = enum.auto()
    """This request is over the server's limit."""
    REFUSED = enum.auto()
    """The request, or some of its points, will never be taken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict with its details."""

    verdict: Verdict
    reason: str = ""
    wait_s: float = 0.0
    """How long the server wants to be left in peace, by RetryInfo."""
    rejected: int = 0
    """Points refused where the others were taken (`partial_success`)."""


class Client(Protocol):
    """What the exporter sends by."""

    def send(self, body: bytes, /) -> Answer: ...

    def close(self, /) -> None: ...


class GrpcClient:
    """Sends over a channel of its own, which is made here."""

    def __init__(self, endpoint: Endpoint, version: str) -> None:
        """Raises OSError where a certificate cannot be read."""
        self._endpoint = endpoint
        self._channel = endpoint.channel(
            (
                ("grpc.primary_user_agent", f"tallymark/{version}"),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 5_000),
            )
        )
        self._call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(METHOD)

    def send(self, body: bytes, /) -> Answer:
        """One attempt, of at most the endpoint's time-out. Raises nothing that the network or the server can cause."""
        apply = _real_thread()
        if apply is None:
            return self._send(body)
        # In this context, which says that our own requests are not to be instrumented.
        return apply(copy_context().run, (self._send, body))

    def _send(self, body: bytes) -> Answer:
        import grpc

        try:
            raw = self._call(body, timeout=self._endpoint.timeout_s, metadata=self._endpoint.headers)
        except grpc.RpcError as error:
            return answer_of(error)
        except ValueError as error:  # the channel was closed from another thread
            return Answer(Verdict.AWAY, str(error))
        try:
            partial = ExportMetricsServiceResponse.FromString(raw).partial_success
        except Exception as error:
            return Answer(Verdict.NOT_NOW, f"the answer is not OTLP: {error!r}")
        if partial.rejected_data_points > 0:
            return Answer(Verdict.REFUSED, partial.error_message, rejected=partial.rejected_data_points)
        return Answer(Verdict.ACKNOWLEDGED, partial.error_message)

    def close(self, /) -> None:
        """Ends what is under way, with CANCELLED."""
        self._channel.close()


def wait_for_threads(patience_s: float) -> None:
    """Returns when gRPC has no threads in this process, which it ends by itself soon after its last connection was
    closed; after so many seconds in any case."""
    deadline = time.monotonic() + patience_s
    if not _TASKS.is_dir():
        time.sleep(min(_UNSEEN_S, patience_s))
        return
    while _has_threads() and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _has_threads() -> bool:
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text(errors="replace").startswith(_THREADS):
                return True
        except OSError:  # it has just ended
            continue
    return False


def _real_thread() -> Callable[[Callable[..., Answer], tuple[object, ...]], Answer] | None:
    """Where gevent has made greenlets of threads, what calls a function in a thread that is one: gRPC waits for its
    answer in C, which would stop every greenlet of the process. None elsewhere; gevent is not imported for it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return None
    apply: Callable[[Callable[..., Answer], tuple[object, ...]], Answer] = (
        sys.modules["gevent"].get_hub().threadpool.apply
    )
    return apply


def answer_of(error: grpc.RpcError) -> Answer:
    """What a failed call means. RESOURCE_EXHAUSTED without RetryInfo may be a limit on a message's size."""
    code = error.code().name
    reason = f"{code}: {error.details()}"
    wait_s = retry_delay(error.trailing_metadata())
    if code == "INVALID_ARGUMENT":
        return Answer(Verdict.REFUSED, reason)
    if code == "RESOURCE_EXHAUSTED" and wait_s is None and "larger than max" in str(error.details()).lower():
        return Answer(Verdict.TOO_LARGE, reason)
    return Answer(Verdict.AWAY if code in _AWAY else Verdict.NOT_NOW, reason, wait_s or 0.0)


def retry_delay(trailing: object) -> float | None:
    """Seconds that a server asks for, in either of the two forms that are in use; None where it asks for none."""
    info = RetryInfo()
    try:
        for key, value in trailing or ():  # type: ignore[attr-defined]
            if key == RETRY_INFO:
                info.ParseFromString(value)
                return _seconds(info)
            if key == STATUS_DETAILS:
                for detail in Status.FromString(value).details:
                    if detail.Unpack(info):
                        return _seconds(info)
    except Exception:
        return None
    return None


def _seconds(info: RetryInfo) -> float:
    seconds = float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return min(max(seconds, 0.0), MAX_RETRY_INFO_S)
