"""Requests that the collector refused for good: kept where a person finds them, with the collector's reason.

A file for each refused request, in OTLP's JSON form: `request` may be posted to `/v1/metrics` as it is, once the reason
is gone. Points of it that the collector did take are known again there.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark.folder import DEAD_LETTER
from tallymark.parcels import replace
from tallymark.reporting import Reporter


class DeadLetters:
    """Writes the files. `place` is the service's folder, None where there is no disk to write to."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.place: Path | None = None
        self.points = 0
        """Points refused since the process began."""

    def keep(self, body: bytes, rejected: int, reason: str) -> None:
        """Keep a request of which `rejected` points were refused. Again: the same file. Raises OSError where it cannot
        be written: then the request must stay in the outbox."""
        where = "nowhere, for there is no disk to write to"
        if self.place is not None:
            folder = self.place / DEAD_LETTER
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"{hashlib.sha256(body).hexdigest()[:32]}.json"
            letter = {
                "reason": reason,
                "rejected_points": rejected,
                "refused_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": MessageToDict(ExportMetricsServiceRequest.FromString(body)),
            }
            replace(path, json.dumps(letter, indent=1).encode())
            where = str(path)
        self.points += rejected
        self._reporter.error(
            "rejected", "the collector refused %d points of usage for good: %s. Kept in %s", rejected, reason, where
        )
