"""The one table from errors to what a client is told.

A client drops what is answered with UNKNOWN, INTERNAL, UNAUTHENTICATED or PERMISSION_DENIED, so nothing that could be
kept by a retry may end as one of them: an error that nobody foresaw least of all, nor a credential that cannot be
looked up while the database is away. The first line that fits counts.
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
    PermanentError,
    StoreUnavailable,
    TransientError,
    Unauthenticated,
)

logger = logging.getLogger(__name__)

RETRY_INFO_KEY: Final = "google.rpc.retryinfo-bin"
"""Where OpenTelemetry's Python exporter looks for the delay."""
DETAILS_KEY: Final = "grpc-status-details-bin"
"""Where gRPC's standard, and every other exporter, has it."""

_CODES: Final[tuple[tuple[type[CollectorError], grpc.StatusCode], ...]] = (
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (PermanentError, grpc.StatusCode.INVALID_ARGUMENT),
    # Overloaded too: RESOURCE_EXHAUSTED is retried only by clients that understand RetryInfo, UNAVAILABLE by all.
    (TransientError, grpc.StatusCode.UNAVAILABLE),
)


class Answer(NamedTuple):
    """How a failed call ends."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def answer(error: Exception) -> Answer:
    """Status and trailing metadata for an error; RetryInfo in both forms where a retry may help."""
    if isinstance(error, StoreUnavailable):
        # The database's words may name its host and user: they are for the log.
        logger.warning("a request is refused for now: %s", error)
        return _answer(grpc.StatusCode.UNAVAILABLE, "the database is not available", error.retry_after)
    for kind, code in _CODES:
        if isinstance(error, kind):
            delay = error.retry_after if isinstance(error, TransientError) else None
            return _answer(code, str(error), delay)
    logger.error("unforeseen error while taking a request; the client is asked to send it again", exc_info=error)
    message = f"unforeseen {type(error).__name__} in the collector: its log has the particulars"
    return _answer(grpc.StatusCode.UNAVAILABLE, message, TransientError.retry_after)


def _answer(code: grpc.StatusCode, message: str, delay: float | None) -> Answer:
    if delay is None:
        return Answer(code, message, ())
    seconds = int(delay)
    info = RetryInfo(retry_delay=Duration(seconds=seconds, nanos=round((delay - seconds) * 1e9)))
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(info)
    metadata = ((RETRY_INFO_KEY, info.SerializeToString()), (DETAILS_KEY, status.SerializeToString()))
    return Answer(code, message, metadata)
