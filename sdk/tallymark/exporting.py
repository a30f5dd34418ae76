"""The timetable: each interval what was recorded is cut, and sent until it is acknowledged.

Two threads, so that a collector that is slow to answer does not make intervals longer: one cuts, leaves the signs of
life that recovered usage is dated by, and looks for what dead processes have left; the other one sends. Nothing of gRPC
exists before there is something to send, so that servers which fork their workers do not fork a channel.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value

from tallymark.delivery import Delivery
from tallymark.journal import Journal
from tallymark.merging import Merger
from tallymark.outbox import Outbox
from tallymark.recorder import MAX_STREAMS, Recorder
from tallymark.recovery import Recovery
from tallymark.reporting import Reporter

RECOVERY_DELAY_S: Final = 30.0
"""A process that records nothing looks for what dead ones have left after this time, unless it has forked by then:
the parent of a server's workers should have no channel of its own."""


class UsageExporter:
    """The threads. `flush` and `shutdown` may be called from any other."""

    def __init__(
        self,
        recorder: Recorder,
        outbox: Outbox,
        journal: Journal,
        recovery: Recovery,
        merger: Merger,
        delivery: Delivery,
        *,
        place: Path | None,
        interval_s: float,
        reporter: Reporter,
        before_cut: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_cut` is called before each cut, to record what has waited for too long."""
        self._before_cut = before_cut
        self._recorder = recorder
        self._outbox = outbox
        self._journal = journal
        self._recovery = recovery
        self._merger = merger
        self._delivery = delivery
        self._place = place
        self._interval_s = interval_s
        self._reporter = reporter
        self._recover_from = time.monotonic() + RECOVERY_DELAY_S
        self._threads: list[threading.Thread] = []
        # A signal's handler may flush, or shut down, in the midst of these, in the same thread: it finds a flag set and
        # gets along without what is under way.
        self._starting = threading.RLock()
        self._is_starting = False
        self._cutting = threading.RLock()
        self._is_cutting = False
        # Flushes are numbered. All that follows is guarded by the condition.
        self._changed = threading.Condition()
        self._requested = 0
        self._cut = 0
        self._confirmed = 0
        self._told = 0
        self._away = False
        self._stopping = False

    def start(self, recover: bool = True) -> bool:
        """Start the threads if they do not run. False when they cannot: the interpreter is about to end, or this is a
        signal's handler that has interrupted their start. With `recover` usage of dead processes is looked for without
        delay."""
        with self._starting:
            if recover:
                self._recover_from = -math.inf
            if self._is_starting:
                return self._is_running()
            self._is_starting = True
            try:
                return self._is_running() or self._start_threads()
            finally:
                self._is_starting = False

    def _is_running(self) -> bool:
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def _start_threads(self) -> bool:
        alive = {thread.name: thread for thread in self._threads if thread.is_alive()}
        targets = {"tallymark-exporter": self._run_cuts, "tallymark-sender": self._run_sending}
        self._threads = [
            alive.get(name) or threading.Thread(target=target, name=name, daemon=True)
            for name, target in targets.items()
        ]
        try:
            for thread in self._threads:
                if thread.name not in alive:
                    thread.start()
        except RuntimeError:
            self._threads = []
            return False
        return True

    def acknowledged_ago_s(self) -> float | None:
        """Seconds since the collector last took something; None where it has not yet."""
        at = self._delivery.acknowledged_at
        return None if at is None else time.monotonic() - at

    def hold_sending(self) -> bool:
        """Before a fork; where it is True, `send_again` is to be called after it, in the parent."""
        return bool(self._threads) and self._delivery.hold()

    def send_again(self) -> None:
        """See `hold_sending`."""
        self._delivery.let_go()

    def leave_recovery_to_others(self) -> None:
        """This process has forked: if it records nothing itself, its children are to recover."""
        if self._recover_from != -math.inf:
            self._recover_from = math.inf

    def flush(self, timeout_s: float) -> bool:
        """Send now, and wait. True when everything that this process recorded before the call is acknowledged; False
        after `timeout_s` seconds without that, it then goes on being tried; False, once, when some was refused for
        good since the flush before."""
        deadline = time.monotonic() + timeout_s
        if (
            not self._threads
            and self._is_delivered()
            and not self._recovery.is_needed(self._place, self._journal.where())
        ):
            return True
        if not self.start():
            self._cut_now()
            self._delivery.run()
            return self._is_delivered() and not self._delivery.rejections
        with self._changed:
            told = self._told
            if self._stopping:
                return self._is_delivered()
            self._requested += 1
            ticket = self._requested
            self._changed.notify_all()
            while self._confirmed < ticket:
                left = deadline - time.monotonic()
                if left <= 0 or self._stopping:
                    return False
                self._changed.wait(left)
            self._told = max(self._told, self._delivery.rejections)
            return self._delivery.rejections <= told

    def finish(self, timeout_s: float) -> bool:
        """Flush as above, note that this producer may end here, and use what is left of the time for usage of dead
        processes. What is recorded afterwards is sent as ever, and another note follows it."""
        deadline = time.monotonic() + timeout_s
        delivered = self.flush(timeout_s)
        if self._note_end(deadline):
            self.flush(max(deadline - time.monotonic(), 0.0))
        with self._changed:
            while self._threads and not self._away and self._outbox.batches(own=False) and not self._stopping:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 0.1))
        return delivered

    def shutdown(self, timeout_s: float) -> bool:
        """Finish as above, then end the threads and close the channel. Again: nothing happens."""
        deadline = time.monotonic() + timeout_s
        delivered = self.finish(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._delivery.close()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.1, deadline - time.monotonic()))
        return delivered

    def _note_end(self, deadline: float) -> bool:
        """True when a note was put into the outbox. Where usage is left, whoever delivers that notes the end."""
        with self._alone(max(deadline - time.monotonic(), 0.0)) as alone:
            try:
                # Recovering what others have left can take long.
                return alone and self._is_delivered() and self._journal.note_end(self._recorder)
            except Exception as error:
                self._reporter.error("end", "the end of the process could not be noted: %r", error, exc_info=error)
                return False

    def _is_delivered(self) -> bool:
        return not self._recorder and not self._journal.unconverted() and not self._outbox.batches()

    def _run_cuts(self) -> None:
        due = time.monotonic() + self._interval_s
        while True:
            with self._changed:
                while not self._stopping and not self._wants_cut() and (left := due - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._stopping:
                    return
                requested = self._requested
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval_s
            done = self._cut_now()
            with self._changed:
                if done:
                    self._cut = max(self._cut, requested)
                elif self._wants_cut():
                    self._changed.wait(0.1)
                self._changed.notify_all()

    def _wants_cut(self) -> bool:
        return self._requested > self._cut and not self._outbox.full

    def _cut_now(self) -> bool:
        """True when all that was recorded before is in the outbox."""
        done = False
        with self._alone() as alone:
            try:
                if not alone:
                    return False
                self._before_cut()
                if self._outbox.full:
                    self._merger.make_room()
                if self._outbox.full:
                    self._reporter.warning(
                        "outbox", "the outbox is full: usage is kept in a longer interval until the collector answers"
                    )
                else:
                    if self._journal.cut(self._recorder) >= MAX_STREAMS:
                        self._reporter.warning(
                            "streams",
                            "over %d streams in one interval: some were counted without dimensions",
                            MAX_STREAMS,
                        )
                    done = True
                self._journal.beat(self._recorder)
                if time.monotonic() >= self._recover_from:
                    self._recovery.run(self._place, self._journal.where())
            except Exception as error:
                self._reporter.error("cut", "usage is kept, it could not be cut now: %r", error, exc_info=error)
        return done

    @contextmanager
    def _alone(self, timeout_s: float = -1.0) -> Iterator[bool]:
        """True inside where nothing else is being cut: by another thread after so many seconds, or by this one, which
        has a signal's handler in the midst of it."""
        if not self._cutting.acquire(timeout=timeout_s):
            yield False
            return
        try:
            if self._is_cutting:
                yield False
                return
            self._is_cutting = True
            try:
                yield True
            finally:
                self._is_cutting = False
        finally:
            self._cutting.release()

    def _run_sending(self) -> None:
        # Instrumentation of gRPC must neither trace these calls nor count them as the service's own.
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        attempted = 0
        again = math.inf
        while True:
            with self._changed:
                while not self._stopping and self._cut == attempted and not self._is_due(again):
                    self._changed.wait(None if math.isinf(again) else max(again - time.monotonic(), 0.001))
                if self._stopping:
                    return
                attempted = self._cut
            pause = self._delivery.run()
            again = math.inf if pause is None else time.monotonic() + pause
            with self._changed:
                self._away = pause is not None
                if not self._outbox.batches():
                    self._confirmed = max(self._confirmed, attempted)
                self._changed.notify_all()

    def _is_due(self, again: float) -> bool:
        if math.isinf(again):
            return self._outbox.is_due()
        return time.monotonic() >= again
