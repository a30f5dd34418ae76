"""The one table from errors to what a client is told, over gRPC and over HTTP.

A client drops what is answered with UNKNOWN, INTERNAL, UNAUTHENTICATED or PERMISSION_DENIED, or with any HTTP status
but 429, 502, 503 and 504, so nothing that could be kept by a retry may end as one of them: an error that nobody foresaw
least of all, nor a credential that cannot be looked up while the database is away.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tallymark_collector.errors import (
    CollectorError,
    Forbidden,
    NotPossible,
    NotThere,
    Overloaded,
    PermanentError,
    StoreUnavailable,
    TakesTooLong,
    TooLarge,
    TransientError,
    Unauthenticated,
    UnsupportedMedia,
)

logger = logging.getLogger(__name__)

RETRY_INFO_KEY: Final = "google.rpc.retryinfo-bin"
"""Where OpenTelemetry's Python exporter looks for the delay."""
DETAILS_KEY: Final = "grpc-status-details-bin"
"""Where gRPC's standard, and every other exporter, has it."""

MAX_MESSAGE: Final = 2_000
"""Bytes of a message over gRPC. It goes as a header, each byte that is no ASCII as three, and once more in the details;
a client takes 16 KiB of headers, and shows of a longer one neither status nor message."""

# The first kind that an error is of.
_TABLE: Final[tuple[tuple[type[CollectorError], grpc.StatusCode, int], ...]] = (
    # Without RetryInfo RESOURCE_EXHAUSTED is final.
    (TooLarge, grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
    (UnsupportedMedia, grpc.StatusCode.INVALID_ARGUMENT, 415),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, 401),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED, 403),
    (NotThere, grpc.StatusCode.NOT_FOUND, 404),
    (NotPossible, grpc.StatusCode.FAILED_PRECONDITION, 409),
    (TakesTooLong, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    (PermanentError, grpc.StatusCode.INVALID_ARGUMENT, 400),
    # RESOURCE_EXHAUSTED is retried only by clients that understand RetryInfo, UNAVAILABLE by all. Over HTTP 429, not
    # 503: balancers count 5xx as a fault of this collector and move its load to the next one, which has as much.
    (Overloaded, grpc.StatusCode.UNAVAILABLE, 429),
    (TransientError, grpc.StatusCode.UNAVAILABLE, 503),
)


class Refusal(NamedTuple):
    """How a failed request ends, in the terms of both protocols."""

    code: grpc.StatusCode
    http_status: int
    message: str
    retry_after: float | None
    """Seconds; None where the same request would fail again."""

    def status(self) -> Status:
        """As `google.rpc.Status`, with RetryInfo where a retry may help."""
        found = Status(code=self.code.value[0], message=self.message)
        if self.retry_after is not None:
            found.details.add().Pack(_retry_info(self.retry_after))
        return found


class Answer(NamedTuple):
    """How a failed call ends over gRPC."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def refusal(error: Exception) -> Refusal:
    """What becomes of a request that ended with this error. Logs what is for the operator alone.

    The error has no traceback afterwards, nor has what it came from.
    """
    refused = _refusal(error)
    _let_go(error)
    return refused


def _let_go(error: BaseException | None) -> None:
    """Leaves nothing of a request that only a search for cycles would free: psycopg's errors of a pipeline, gRPC's of a
    call and any that a future holds are in cycles with the frames that they passed through, where its bytes are."""
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _let_go(error.__cause__)
        _let_go(error.__context__)


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, StoreUnavailable):
        # The database's words may name its host and user: they are for the log.
        logger.warning("a request is refused for now: %s", error)
        return Refusal(grpc.StatusCode.UNAVAILABLE, 503, "the database is not available", error.retry_after)
    for kind, code, http_status in _TABLE:
        if isinstance(error, kind):
            delay = error.retry_after if isinstance(error, TransientError) else None
            return Refusal(code, http_status, str(error), delay)
    logger.error("unforeseen error while taking a request; the client is asked to send it again", exc_info=error)
    message = f"unforeseen {type(error).__name__} in the collector: its log has the particulars"
    return Refusal(grpc.StatusCode.UNAVAILABLE, 503, message, TransientError.retry_after)


def _cut(text: str) -> str:
    encoded = text.encode("utf-8", "replace")
    return text if len(encoded) <= MAX_MESSAGE else f"{encoded[:MAX_MESSAGE].decode('utf-8', 'ignore')}…"


def answer(error: Exception) -> Answer:
    """Status and trailing metadata for an error; RetryInfo in both forms where a retry may help."""
    refused = refusal(error)
    refused = refused._replace(message=_cut(refused.message))
    if refused.retry_after is None:
        return Answer(refused.code, refused.message, ())
    metadata = (
        (RETRY_INFO_KEY, _retry_info(refused.retry_after).SerializeToString()),
        (DETAILS_KEY, refused.status().SerializeToString()),
    )
    return Answer(refused.code, refused.message, metadata)


def _retry_info(delay: float) -> RetryInfo:
    seconds = int(delay)
    return RetryInfo(retry_delay=Duration(seconds=seconds, nanos=round((delay - seconds) * 1e9)))
