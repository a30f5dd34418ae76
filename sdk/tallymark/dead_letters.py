"""Requests that the collector refused for good: kept where a person finds them, with the collector's reason.

A file for each refused request, in OTLP's JSON form: `request` may be posted to `/v1/metrics` as it is, once the reason
is gone. Points of it that the collector did take are known again there.

Together they take at most `MAX_BYTES`. Beyond that nothing is deleted: what is refused stays in the outbox and is tried
again, and the outbox merges what waits behind it, until somebody has seen to the reason or made room.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark.folder import DEAD_LETTER, bytes_in
from tallymark.parcels import replace
from tallymark.reporting import Reporter

MAX_BYTES: Final = 256 * 2**20
"""Size of one service's `dead-letter/`, all of its processes together."""

LOOK_AGAIN_S: Final = 10.0
"""Other processes write to the folder too, and a person makes room in it: its size is looked up again after this."""


class DeadLettersFullError(OSError):
    """There is no room for a refused request; the message says where, and what to do."""


class DeadLetters:
    """Writes the files. `place` is the service's folder, None where there is no disk to write to."""

    def __init__(self, reporter: Reporter, max_bytes: int | None = None) -> None:
        self._reporter = reporter
        self._max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self._size = 0
        self._looked = -math.inf
        self.place: Path | None = None
        self.points = 0
        """Points refused since the process began."""
        self.held_back = 0
        """Times that a refused request had no room here, since the process began."""

    def keep(self, body: bytes, rejected: int, reason: str) -> None:
        """Keep a request of which `rejected` points were refused. Again: the same file. Raises OSError where it cannot
        be written, DeadLettersFullError among them: then the request must stay in the outbox."""
        where = "nowhere, for there is no disk to write to"
        is_new = True
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
            text = json.dumps(letter, indent=1).encode()
            is_new = not path.exists()
            if is_new:
                self._take_room(folder, len(text), reason)
            replace(path, [text])
            where = str(path)
        if is_new:  # a request of which a part has no room here is sent, and refused, as a whole again
            self.points += rejected
        self._reporter.error(
            "rejected", "the collector refused %d points of usage for good: %s. Kept in %s", rejected, reason, where
        )

    def _take_room(self, folder: Path, size: int, reason: str) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_AGAIN_S:
            self._size, self._looked = bytes_in(folder), now
        if self._size + size > self._max_bytes:
            self.held_back += 1
            message = (
                f"{folder} is full ({self._max_bytes} bytes): what the collector refuses stays in the outbox. "
                f"See to the reason, the last one is: {reason}"
            )
            self._reporter.error("dead_letters", "%s", message)
            raise DeadLettersFullError(message)
        self._size += size
