"""The next hop over gRPC or HTTP: one request sent, and what its answer means for the request."""

from __future__ import annotations

import asyncio
import enum
import gzip
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

import aiohttp
import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from tallymark_collector.errors import UserError
from tallymark_collector.settings import Compression

SEND_TIMEOUT: Final = 30.0
"""Seconds for one request and its answer, where it has not been found that it needs more."""
MAX_ANSWER: Final = 1 << 20
SURELY_TAKEN: Final = 64 * 1024
"""Bytes that no next hop refuses for their number: where it does not say what it has too little of, it is not that."""
_GZIP_LEVEL: Final = 6
_METHODS: Final = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
_SCHEMES: Final = ("grpc", "grpcs", "http", "https")


class Fate(enum.Enum):
    """What is to become of a request that was sent."""

    TAKEN = "taken"
    LATER = "later"
    """Not now: time, or a person at the next hop, may mend it."""
    SLOW = "slow"
    """Not within the time that it had, here or there: the next hop is silent, or the request takes longer."""
    UNCLEAR = "unclear"
    """A fault of the next hop's that may come again with this very request: a few more tries."""
    TOO_LARGE = "too large"
    """Never as one request; smaller ones may be taken."""
    NEVER = "never"


class Verdict(NamedTuple):
    """The next hop's answer."""

    fate: Fate
    words: str = ""
    """For the log: the status and what the next hop said."""
    delay: float | None = None
    """Seconds that it asked for."""
    rejected: int = 0
    """Points, spans or records of a taken request that it refused (partial success)."""


class Hop(Protocol):
    """Where requests are sent."""

    async def send(self, signal: str, body: bytes, timeout: float = SEND_TIMEOUT) -> Verdict:
        """Sends one request, which has so many seconds. Raises nothing but CancelledError."""
        ...


def endpoint_of(text: str) -> SplitResult:
    """A next hop's address. Raises UserError."""
    found = urlsplit(text)
    try:
        port, valid = found.port, True
    except ValueError:
        port, valid = None, False
    fitting = (
        valid and found.scheme in _SCHEMES and found.hostname and not (found.username or found.query or found.fragment)
    )
    if not fitting or (found.scheme.startswith("grpc") and (port is None or found.path not in ("", "/"))):
        # Not the text itself: a person may have put a password in it.
        raise UserError(
            "--forward-to is no address: write grpc://host:port, grpcs://host:port, http://host:port or https://host;"
            " credentials belong into TALLYMARK_FORWARD_HEADERS"
        )
    return found


@asynccontextmanager
async def hop(
    endpoint: str, headers: Sequence[tuple[str, str]], compression: Compression = Compression.GZIP
) -> AsyncIterator[Hop]:
    """The next hop at an endpoint. Raises UserError."""
    address = endpoint_of(endpoint)
    if address.scheme.startswith("grpc"):
        options = [("grpc.max_send_message_length", -1), ("grpc.max_reconnect_backoff_ms", 10_000)]
        channel = (
            grpc.aio.secure_channel(address.netloc, grpc.ssl_channel_credentials(), options)
            if address.scheme == "grpcs"
            else grpc.aio.insecure_channel(address.netloc, options)
        )
        async with channel:
            yield GrpcHop(channel, headers, compression)
    else:
        async with aiohttp.ClientSession(headers=list(headers), trust_env=True) as session:
            yield HttpHop(session, endpoint.rstrip("/"), compression)


_LATER_CODES: Final = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
        # A person's to mend at either end, and nothing is wrong with the request.
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_UNCLEAR_CODES: Final = frozenset(
    {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED}
)
_TOO_LARGE: Final = re.compile(r"larger than max|exceeds (the )?max|too large", re.IGNORECASE)
"""As gRPC in C++, Go, Java and .NET, Rust's tonic and Go's HTTP server say it."""
_TOO_SLOW: Final = re.compile(r"did not arrive within")
"""As we say it ourselves."""
_COMPRESSIONS: Final = {Compression.GZIP: grpc.Compression.Gzip, Compression.NONE: grpc.Compression.NoCompression}


class GrpcHop:
    """Over gRPC."""

    def __init__(self, channel: grpc.aio.Channel, headers: Sequence[tuple[str, str]], compression: Compression) -> None:
        self._calls: dict[str, Callable[..., Awaitable[bytes]]] = {
            signal: channel.unary_unary(method) for signal, method in _METHODS.items()
        }
        self._headers = grpc.aio.Metadata(*headers)
        self._compression = _COMPRESSIONS[compression]

    async def send(self, signal: str, body: bytes, timeout: float = SEND_TIMEOUT) -> Verdict:
        """Sends one request, which has so many seconds. Raises nothing but CancelledError."""
        try:
            answer = await self._calls[signal](
                body, timeout=timeout, metadata=self._headers, compression=self._compression
            )
        except grpc.aio.AioRpcError as error:
            delay = _retry_delay(error)
            words = f"{error.code().name}: {str(error.details())[:200]}"
            if delay is None and _is_too_large(error, len(body)):
                return Verdict(Fate.TOO_LARGE, words)
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED or _TOO_SLOW.search(words):
                return Verdict(Fate.SLOW, words, delay)
            if error.code() in _LATER_CODES or (
                error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and delay is not None
            ):
                return Verdict(Fate.LATER, words, delay)
            return Verdict(Fate.UNCLEAR if error.code() in _UNCLEAR_CODES else Fate.NEVER, words, delay)
        return _taken(answer)


def _is_too_large(error: grpc.aio.AioRpcError, size: int) -> bool:
    says_so = _TOO_LARGE.search(str(error.details())) is not None
    if error.code() is grpc.StatusCode.OUT_OF_RANGE:  # Rust's tonic
        return says_so
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (says_so or size > SURELY_TAKEN)


def _retry_delay(error: grpc.aio.AioRpcError) -> float | None:
    info = RetryInfo()
    try:
        for key, value in error.trailing_metadata() or ():
            if key == "google.rpc.retryinfo-bin":
                info = RetryInfo.FromString(value)
                return _seconds(info)
            if key == "grpc-status-details-bin":
                for detail in Status.FromString(value).details:
                    if detail.Unpack(info):
                        return _seconds(info)
    except DecodeError:
        pass
    return None


def _seconds(info: RetryInfo) -> float:
    return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)


class HttpHop:
    """Over HTTP, in protobuf."""

    def __init__(self, session: aiohttp.ClientSession, base: str, compression: Compression) -> None:
        self._session = session
        self._base = base
        self._compresses = compression is Compression.GZIP

    async def send(self, signal: str, body: bytes, timeout: float = SEND_TIMEOUT) -> Verdict:
        """Sends one request, which has so many seconds. Raises nothing but CancelledError."""
        headers = {"Content-Type": "application/x-protobuf"}
        if self._compresses:
            headers["Content-Encoding"] = "gzip"
            body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL)
        try:
            async with self._session.post(
                f"{self._base}/v1/{signal}",
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
            ) as response:
                answer = await response.content.read(MAX_ANSWER)
        except asyncio.TimeoutError:
            return Verdict(Fate.SLOW, f"no answer within {timeout:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Verdict(Fate.LATER, f"{type(error).__name__}: {str(error)[:200]}")
        status = response.status
        if 200 <= status < 300:
            return _taken(answer)
        words = f"HTTP {status} {response.reason}"
        delay = _retry_after(response.headers.get("Retry-After"))
        # Go's HTTP servers, OpenTelemetry's Collector among them, answer 400 and say why.
        said = answer.decode("utf-8", "replace")
        if status == 413 or (status == 400 and _TOO_LARGE.search(said)):
            return Verdict(Fate.TOO_LARGE, words)
        if status in (408, 504) or (status == 503 and _TOO_SLOW.search(said)):
            return Verdict(Fate.SLOW, words, delay)
        # 3xx, 401, 403, 404, 407, 415: a person's to mend, and nothing is wrong with the request.
        if status < 400 or status in (401, 403, 404, 407, 415, 429, 502, 503):
            return Verdict(Fate.LATER, words, delay)
        return Verdict(Fate.UNCLEAR if status >= 500 else Fate.NEVER, words, delay)


def _retry_after(text: str | None) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3); None where it is neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _taken(answer: bytes) -> Verdict:
    try:
        # The three signals' answers have the same fields.
        partial = ExportMetricsServiceResponse.FromString(answer).partial_success
    except DecodeError:
        return Verdict(Fate.TAKEN)
    return Verdict(Fate.TAKEN, partial.error_message[:200], rejected=partial.rejected_data_points)
