"""Inputs against a collector process over sockets: it answers, survives, and takes no more room for it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

import grpc
import psutil
import psycopg
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tests.delivery.fuzz import sockets
from tests.delivery.fuzz.checks import hold
from tests.delivery.fuzz.metered import KONG
from tests.delivery.fuzz.mutation import Input
from tests.support.collector import Collector
from tests.support.telemetry import histogram, histogram_point, metrics_of
from tests.support.usage import SECOND, number, request, sum_metric

PROBED_AFTER: Final = 200
"""Inputs after which a valid request of each protocol has to be taken, and found."""
PROBES: Final = ("probe.grpc", "probe.http", "probe.file")
"""Accounts of these: of two protocols, and one that the file of meters names."""
MiB: Final = 2**20
GROWTH: Final = 24 * MiB
"""What the process may grow by after the first third, beside what it remembers of streams."""
STREAM_BYTES: Final = 4096
"""Of one stream that it had not seen: in the decoder's memory and in the store's."""
DESCRIPTORS: Final = 32
_FINE: Final = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
_REFUSED: Final = (400, 404, 405, 408, 411, 413, 414, 415, 417, 426, 431)


class Served:
    """Sends inputs to a running collector."""

    def __init__(self, collector: Collector, seed: int, now_ns: int) -> None:
        """`now_ns`: about when the inputs' points are."""
        self.counts: Counter[str] = Counter()
        self.collector = collector
        self._seed = seed
        self._now_ns = now_ns
        assert collector.process is not None
        self._process = psutil.Process(collector.process.pid)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{collector.port}")
        self._probes = 0
        self._samples: list[tuple[int, int, int]] = []

    def close(self) -> None:
        """Gives the connection back."""
        self._channel.close()

    def take(self, given: Input) -> None:
        """Raises Broken where the answer is none that may be."""
        self.counts["inputs"] += 1
        match given.number % 10:
            case 0 | 1 | 2 | 3 if given.media == "protobuf":
                self._call(given)
            case 4:
                answer = sockets.exchange(self.collector.port, sockets.http2(given, self._seed))
                self.counts["HTTP/2 frames: answered" if answer else "HTTP/2 frames: hung up"] += 1
            case _:
                self._post(given)
        self._check_alive()
        if self.counts["inputs"] % PROBED_AFTER == 0:
            self.probe()

    def _call(self, given: Input) -> None:
        call = self._channel.unary_unary(sockets.method(given.signal))
        try:
            try:
                answer = call(given.body, timeout=sockets.ANSWER_S)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or "refused" not in (error.details() or ""):
                    raise
                # Frames that gRPC's own loop died of: the collector listens again, and a client that retries is heard.
                self.counts["gRPC: away for a moment"] += 1
                answer = call(given.body, timeout=sockets.ANSWER_S, wait_for_ready=True)
        except grpc.RpcError as error:
            code = error.code()
            self.counts[f"gRPC: {code.name}"] += 1
            self.counts["refused"] += 1
            hold(code in _FINE, "gRPC", code, error.details(), given)
            self._check_sent(given, None)
        else:
            self._check_sent(given, answer)
            self.counts["gRPC: OK"] += 1
            self.counts["accepted"] += 1

    def _post(self, given: Input) -> None:
        wire = sockets.http(given, self._seed)
        answer = sockets.exchange(self.collector.http_port, wire)
        if not answer:
            hold(not wire.whole, "no answer", wire.how, given)
            self.counts[f"{wire.how}: hung up"] += 1
            return
        # Of several answers to what became several requests, each counts.
        codes = [int(line[9:12]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/")]
        hold(codes, "no HTTP", answer[:200])
        for code in codes:
            self.counts[f"{wire.how}: {code}"] += 1
            self.counts["accepted" if code == 200 else "refused"] += code != 100
            hold(code in (100, 200, *_REFUSED), "HTTP", code, answer[:2000], wire.how, given)
        if wire.how in ("HTTP", "HTTP, gzip"):
            self._check_sent(given, answer.partition(b"\r\n\r\n")[2] if codes == [200] else None)

    def _check_sent(self, given: Input, answer: bytes | None) -> None:
        """Where it is known what has to become of an input, the answer (None: it was refused) says so. (The file takes
        any span's name, so of large resources beside spans more than is known here.)"""
        sent = given.sent
        if sent is None or not (given.by_file or given.signal == "metrics"):
            return
        self.counts["large"] += 1
        hold((answer is None) is sent.too_large, "large", answer, sent, given.damage)
        if answer is not None:
            rejected = 0
            if given.signal == "metrics":
                rejected = ExportMetricsServiceResponse.FromString(answer).partial_success.rejected_data_points
            else:
                rejected = ExportTraceServiceResponse.FromString(answer).partial_success.rejected_spans
            hold(rejected == sent.rejected, "not what was sent", rejected, sent, given.damage)

    def _check_alive(self) -> None:
        assert self.collector.process is not None
        status = self.collector.process.poll()
        hold(status is None, "the process has ended", status)

    def probe(self) -> None:
        """Sends what is valid by each protocol; what was stored of all of these so far has to be their sum."""
        self._probes += 1
        for account in PROBES:
            at = self._now_ns + self._probes
            body = request(
                sum_metric([number(self._now_ns - SECOND, at, self._probes, {"tallymark.account.id": account})])
            )
            if account == "probe.file":
                known = {"key.id": "probe", "http.response.status_code": 200}
                body = metrics_of(
                    KONG, histogram([histogram_point(self._now_ns - SECOND, at, self._probes, 1.0, known)])
                )
            given = Input(-1, "metrics", "protobuf", body.SerializeToString(), "none")
            if account != "probe.http":
                call = self._channel.unary_unary(sockets.method("metrics"))
                call(given.body, timeout=sockets.ANSWER_S, wait_for_ready=True)
            else:
                head = f"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(given.body)}"
                data = f"{head}\r\nContent-Type: application/x-protobuf\r\n\r\n".encode() + given.body
                answer = sockets.exchange(self.collector.http_port, sockets.Wire(data, True, "HTTP"))
                hold(answer.startswith(b"HTTP/1.1 200 "), "a valid request", answer[:400])
        with psycopg.connect(self.collector.dsn, options="-c search_path=tallymark") as connection:
            stored = dict(
                connection.execute(
                    "SELECT account, sum(quantity) FROM usage_point WHERE account LIKE 'probe.%' GROUP BY account"
                ).fetchall()
            )
            [streams] = connection.execute("SELECT count(*) FROM usage_stream").fetchone() or [0]
        total = self._probes * (self._probes + 1) // 2
        hold(stored == dict.fromkeys(PROBES, total), "valid requests", stored, total)
        self._samples.append((self._process.memory_info().rss, self._process.num_fds(), streams))
        self.counts["valid requests in between"] += len(PROBES)

    def check_flat(self) -> str:
        """Compares memory and descriptors of the process at the end with those after a third; says both in a line."""
        self._wait_for_descriptors()
        (early, files, streams), (late, *_, more) = self._samples[len(self._samples) // 3], self._samples[-1]
        files_now = self._process.num_fds()
        line = (
            f"a collector's memory {early / MiB:.0f} MiB after a third and {late / MiB:.0f} MiB at the end, with"
            f" {more - streams} streams more; descriptors {files} and {files_now}"
        )
        hold(late - early <= GROWTH + STREAM_BYTES * (more - streams), "memory grows", line)
        hold(files_now <= files + DESCRIPTORS, "descriptors grow", line)
        return line

    def _wait_for_descriptors(self) -> None:
        """Connections that were hung up on are closed when the server has seen it."""
        deadline = time.monotonic() + sockets.ANSWER_S
        while self._process.num_fds() > self._samples[0][1] + DESCRIPTORS and time.monotonic() < deadline:
            time.sleep(0.1)
