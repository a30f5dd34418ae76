"""Observable instruments of the host's MeterProvider: made once for the process, in a thread of their own.

OpenTelemetry lets none go again, and makes who makes one wait for a collection that is under way: a callback of
somebody else's that hangs must not stop delivery.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from tallymark import conventions

if TYPE_CHECKING:
    from collections.abc import Hashable

    from opentelemetry.metrics import Meter as OtelMeter
    from opentelemetry.metrics import MeterProvider

K = TypeVar("K", bound=Hashable)

WAIT_S: Final = 1.0
"""How long `configure()` waits for its instruments to be made."""


class InstrumentMaker(abc.ABC, Generic[K]):
    """Makes those that are wanted, each once, in the scope that is never billed."""

    def __init__(self, version: str, provider: MeterProvider | None, most: int) -> None:
        """With `provider` None they are the global MeterProvider's, whenever the host sets that."""
        self._version = version
        self._provider = provider
        self._most = most
        self._lock = threading.Lock()
        self._wanted: set[K] = set()
        self._made: set[K] = set()

    @abc.abstractmethod
    def make(self, otel_meter: OtelMeter, wanted: K) -> None:
        """Make one instrument; its callback must not raise."""

    @abc.abstractmethod
    def report(self, wanted: K, error: Exception) -> None:
        """One could not be made."""

    def want(self, several: Iterable[K], wait_s: float = 0.0) -> None:
        """Make those that are not there yet; waits no longer than that for it."""
        with self._lock:
            new = [one for one in several if one not in self._wanted][: self._most - len(self._wanted)]
            self._wanted.update(new)
        if not new:
            return
        thread = threading.Thread(target=self._make, args=(new,), name="tallymark-mirror", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is about to end
            self._wanted.difference_update(new)
            return
        thread.join(wait_s)

    def after_fork(self) -> None:
        """In the child: the thread that was to make some may not exist here."""
        self._lock = threading.Lock()
        self._wanted = set(self._made)

    def _make(self, several: Iterable[K]) -> None:
        from opentelemetry.metrics import get_meter

        for one in several:
            try:
                self.make(get_meter(conventions.MIRROR_SCOPE_NAME, self._version, self._provider), one)
                self._made.add(one)
            except Exception as error:
                self.report(one, error)
