"""Sends what is in the outbox, and does with each request what its answer asks for."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

from tallymark.batches import count_points, halves
from tallymark.dead_letters import DeadLetters
from tallymark.outbox import Outbox
from tallymark.parcels import Batch
from tallymark.reporting import Reporter
from tallymark.sending import Answer, Client, Verdict, wait_for_threads

FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 30.0
MAX_POSTPONED_S: Final = 120.0
JITTER: Final = 0.2

MAX_PARTS: Final = 64
"""Requests that the search for a refused point may take; what is not told apart by then is refused together."""

MAX_NOT_NOW: Final = 3
"""Requests one after the other that a server does not take, before it is left in peace for a while."""

FORK_PATIENCE_S: Final = 2.0
"""The longest that a fork waits for a request under way to end, once it has been cancelled."""

GRPC_PATIENCE_S: Final = 0.25
"""The longest that a fork waits for gRPC's threads to end, once the connection is closed. That takes about ten
milliseconds, but they never end where the service has connections of its own."""


class Delivery:
    """Holds the connection. `run` may be called from any thread; one at a time is in it."""

    def __init__(self, outbox: Outbox, letters: DeadLetters, reporter: Reporter, connect: Callable[[], Client]) -> None:
        self._outbox = outbox
        self._letters = letters
        self._reporter = reporter
        self._connect = connect
        self._client: Client | None = None
        self._running = threading.RLock()
        self._is_running = False
        self._failures = 0
        self._closed = False
        self._held = False
        self._peace_until = 0.0
        self.rejections = 0
        """Requests that were refused for good, wholly or in part."""
        self.acknowledged_at: float | None = None
        """When the collector last took something, by the monotonic clock."""

    def run(self) -> float | None:
        """Sends all that is due. The seconds after which to come again; None where nothing is left to be sent.

        Within the time that the server has asked for, nothing is sent; nor by a signal's handler that has interrupted
        this, in the same thread.
        """
        with self._running:
            if self._is_running:
                return FIRST_BACKOFF_S
            self._is_running = True
            try:
                return self._run()
            finally:
                self._is_running = False

    def _run(self) -> float | None:
        not_now = 0
        while not self._closed and not self._held and (batch := self._outbox.head()) is not None:
            left = self._peace_until - time.monotonic()
            if left > 0:
                return left
            answer = self._deliver(batch)
            if answer.verdict is Verdict.AWAY:
                self._reporter.warning("away", "usage cannot be delivered now and is kept: %s", answer.reason)
                return self._back_off(answer.wait_s)
            if answer.verdict is Verdict.NOT_NOW:
                batch.attempts += 1
                self._outbox.postpone(batch, jittered(2.0 ** min(batch.attempts - 1, 16), MAX_POSTPONED_S))
                self._reporter.error(
                    "not_now", "the collector does not take a request of usage, which is kept: %s", answer.reason
                )
                not_now += 1
                if not_now >= MAX_NOT_NOW:
                    return self._back_off(answer.wait_s)
                continue
            not_now = self._failures = 0
            self._outbox.acknowledge(batch)
        return FIRST_BACKOFF_S if len(self._outbox) else None

    def hold(self) -> bool:
        """Before a fork: cancels what is under way, ends the connection, and sends nothing until `let_go`, which is to
        be called if this is True.

        gRPC cannot be forked from within a call: the child could never send anything. Nor can it with a connection that
        is idle: whatever lock of its own one of its threads holds at that moment, nobody ever releases in the child,
        whose first connection then waits for it for ever and lets no other thread of Python run. And its own handler,
        which stops these threads for a fork, at times waits for them in vain. Without a connection it has no threads.
        """
        held = self._running.acquire(blocking=False)
        closed = False
        if not held:
            self._held = True
            closed = self._disconnect()
            held = self._running.acquire(timeout=FORK_PATIENCE_S)
            self._held = False
        if self._disconnect() or closed:
            wait_for_threads(GRPC_PATIENCE_S)
        return held

    def _disconnect(self) -> bool:
        """True where there was a connection."""
        client, self._client = self._client, None
        if client is None:
            return False
        client.close()
        return True

    def let_go(self) -> None:
        """After it, in the parent: sends again."""
        self._running.release()

    def close(self) -> None:
        """Closes the channel, which ends what is under way, and sends nothing more."""
        self._closed = True
        client = self._client
        if client is not None:
            client.close()

    def _back_off(self, asked_s: float) -> float:
        self._failures += 1
        own = jittered(FIRST_BACKOFF_S * 2 ** min(self._failures - 1, 16), MAX_BACKOFF_S)
        if asked_s:
            self._peace_until = time.monotonic() + asked_s
        return max(own, asked_s)

    def _deliver(self, batch: Batch) -> Answer:
        """Sends a request, in parts if need be. REFUSED is never returned: it has been seen to."""
        try:
            batch.parcel.note_attempt()
            parts = [batch.read()]
            tried = 0
            while parts:
                body = parts.pop()
                answer = self._send(body)
                tried += 1
                if answer.verdict in (Verdict.AWAY, Verdict.NOT_NOW):
                    return answer
                if answer.verdict is Verdict.ACKNOWLEDGED:
                    self.acknowledged_at = time.monotonic()
                    if answer.reason:
                        self._reporter.warning("told", "the collector took the usage and says: %s", answer.reason)
                    continue
                both = None
                if not answer.rejected and (answer.verdict is Verdict.TOO_LARGE or tried < MAX_PARTS):
                    both = halves(body)
                if both is not None:
                    parts += reversed(both)
                elif answer.verdict is Verdict.TOO_LARGE:
                    return Answer(Verdict.NOT_NOW, answer.reason)
                else:
                    self._letters.keep(body, answer.rejected or count_points(body), answer.reason)
                    self.rejections += 1
        except OSError as error:
            return Answer(Verdict.NOT_NOW, f"{type(error).__name__}: {error}")
        except Exception as error:
            self._reporter.error("export", "usage could not be exported and is kept: %r", error, exc_info=error)
            return Answer(Verdict.NOT_NOW, repr(error))
        return Answer(Verdict.ACKNOWLEDGED)

    def _send(self, body: bytes) -> Answer:
        if self._client is None:
            self._client = self._connect()
        return self._client.send(body)


def jittered(seconds: float, most: float) -> float:
    """About so many seconds, so that producers that failed together do not come back together."""
    return min(seconds, most) * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
