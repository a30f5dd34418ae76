"""The program that is broken: it forks processes that record usage, each as an order on its standard input says.

Run as `python -m tests.delivery.faults.recording`. Forked and not started anew, for an interpreter with everything that
is imported here takes a second: it has not been configured and has neither threads nor channels, so each process begins
as any other does. An order is a line of JSON and is answered by one:

    {"start": Order}  →  {"pid": 123}
    {"ended": null}   →  {"123": exit status, …}  of processes that ended since, also of their children
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import faulthandler
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

_real_time_ns = time.time_ns
_step_ns = 0
time.time_ns = lambda: _real_time_ns() + _step_ns  # before Tallymark takes it for its clock

import grpc  # noqa: E402, F401

import tallymark  # noqa: E402
from tallymark import delivery, outbox, runtime  # noqa: E402
from tests.delivery.faults.tally import ACCOUNTS, METERS, THREADS, UNITS, Tally  # noqa: E402

LIFETIME_S = 150
PATIENCE_S = 60
"""A process that is forgotten ends by itself."""

delivery.FIRST_BACKOFF_S = 0.02  # type: ignore[misc]
delivery.MAX_BACKOFF_S = 0.2  # type: ignore[misc]


def _declared(name: str) -> Callable[[int], object]:
    unit = UNITS[name]

    @tallymark.track_usage(name, quantity=lambda result: result)
    def handler(count: int) -> int | float | Decimal:
        if name == "tenths":
            return count / 10
        return count if name == "whole" else unit * count

    return handler


HANDLERS = [_declared(name) for name in METERS]


def ending(stop: threading.Event) -> Callable[..., object]:
    """What a signal is handled by. Not in this thread, which may be in the midst of `wait`, with the event's lock."""
    return lambda *_: _thread.start_new_thread(stop.set, ())


class Life:
    """One process. `order`: see `tests.delivery.faults.scenario`."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.tally = Tally(Path(order["tally"]), order["regions"])
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.children: list[int] = []

    def begin(self, region: int) -> None:
        """Says who it is, and records from now on."""
        self.tally.words[self.tally.of(region)] = os.getpid()
        for thread in range(THREADS):
            self.threads.append(threading.Thread(target=self.work, args=(region, thread), daemon=True))
            self.threads[-1].start()

    def work(self, region: int, thread: int) -> None:
        rng = random.Random(f"{self.order['seed']}-{region}-{thread}")
        words = self.tally.words
        while not self.stop.is_set():
            account, meter = rng.randrange(ACCOUNTS), rng.randrange(len(METERS))
            count = 1 if METERS[meter] == "wide" else rng.randint(1, 99_999)
            at = self.tally.at(region, thread, account, meter)
            with tallymark.identify(account=f"{self.order['name']}-{account}"):
                words[at] += count
                HANDLERS[meter](count)
                words[at + 1] += count
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.004)

    def run(self) -> None:
        order = self.order
        if order["stop_on_term"]:
            signal.signal(signal.SIGTERM, ending(self.stop))
        outbox.MAX_BYTES = order["outbox_bytes"]  # type: ignore[misc]
        runtime.current().outbox.max_bytes = order["outbox_bytes"]
        if order["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
        tallymark.configure(
            endpoint=f"http://127.0.0.1:{order['port']}",
            interval=order["interval"],
            timeout=order["timeout"],
            shutdown_timeout=0.2,
            state_dir=order["state_dir"],
            resource={"service.name": order["name"]},
        )
        if order["last"]:
            self.recover()
            return
        self.begin(order["region"])
        began = time.monotonic()
        for at, what, value in order["plan"]:
            self.stop.wait(max(0.0, began + at - time.monotonic()))
            if self.stop.is_set():
                break
            self.do(what, value)
        self.stop.wait(max(0.0, began + order["lasts"] - time.monotonic()))
        self.end(order["end"])

    def do(self, what: str, value: Any) -> None:
        global _step_ns
        if what == "clock":
            _step_ns += int(value * 1e9)
        elif what == "file_bytes":
            resource.setrlimit(resource.RLIMIT_FSIZE, (value or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif what == "fork":
            pid = os.fork()
            if pid:
                self.children.append(pid)
                return
            self.threads, self.children, self.stop = [], [], threading.Event()
            if self.order["stop_on_term"]:
                signal.signal(signal.SIGTERM, ending(self.stop))
            signal.alarm(LIFETIME_S)
            self.begin(value["region"])
            try:
                self.stop.wait(value["lasts"])
                self.end(value["end"])
            except BaseException:
                tell()
                os._exit(1)
            os._exit(0)

    def end(self, how: str) -> None:
        """`exit`: without a word, as a forked worker does. `delivered`: all of its own usage has been acknowledged."""
        if how == "stay":
            self.stop.wait()
        if how == "exit":
            os._exit(0)
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if how == "delivered":
            deadline = time.monotonic() + PATIENCE_S
            while not tallymark.flush(1):
                if time.monotonic() > deadline:
                    raise TimeoutError("its own usage was not delivered")
            for child in self.children:
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # whoever waits for all of them does so too
        atexit._run_exitfuncs()

    def recover(self) -> None:
        """Until nothing of anybody is left to be delivered."""
        own = runtime.current()
        with tallymark.identify(account=f"{self.order['name']}-last"):
            tallymark.record("last")
        deadline = time.monotonic() + PATIENCE_S
        while (
            not tallymark.flush(1)
            or own.outbox.batches(own=False)
            or own.recovery.is_needed(own.letters.place, own.journal.where())
        ):
            if time.monotonic() > deadline:
                raise TimeoutError("not everything was recovered")
            time.sleep(0.005)
        tallymark.shutdown(PATIENCE_S)


def start(order: dict[str, Any]) -> int:
    """Forks a process that does as the order says."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody outlives the harness
        signal.alarm(LIFETIME_S)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDWR)
        for to, descriptor in ((0, null), (1, null), (2, log)):
            os.dup2(descriptor, to)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1)
        Life(order).run()
        code = 0
    except BaseException:
        tell()
    finally:
        os._exit(code)


def tell() -> None:
    """The error, in the run's log, which the limit on files holds for as well."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    traceback.print_exc()
    faulthandler.dump_traceback()


def ended() -> dict[int, int]:
    """Processes that have ended since the last time."""
    found = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        found[pid] = os.waitstatus_to_exitcode(status)
    return found


def main() -> None:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: children of those that were killed end here
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"pid": start(order["start"])} if "start" in order else ended()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
