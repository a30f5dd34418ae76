"""Gateways that deliver to collectors, any of them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.delivery.contract.access import Access
from tests.delivery.contract.items import request
from tests.delivery.contract.load import Gateway
from tests.delivery.contract.targets import Request, Target


class Sender(threading.Thread):
    """One gateway at work: until it is told to finish, and then until all is acknowledged."""

    def __init__(self, gateway: Gateway, access: Access, targets: Sequence[Target], least: int) -> None:
        """`least` requests at the least are made of fresh usage."""
        super().__init__(daemon=True)
        self.gateway = gateway
        self.access = access
        self.problems: list[str] = []
        self.answers: Counter[str] = Counter()
        self.finish = threading.Event()
        self.give_up = threading.Event()
        self._rng = random.Random(gateway.rng.random())
        self._least = least
        self._targets = targets
        self._pool = ThreadPoolExecutor(2)

    def run(self) -> None:
        """All of it."""
        try:
            made = 0
            while not self.give_up.is_set() and (made < self._least or not self.finish.is_set()):
                self.gateway.use()
                self._metrics()
                if self._rng.random() < 0.3:
                    self._until_acknowledged(self.gateway.calls_behind())
                if self._rng.random() < 0.15:
                    self._steal()
                made += 1
                # What goes on for long need not be met by more and more usage.
                time.sleep(self._rng.uniform(0, 0.02 if made < 3 * self._least else 0.2))
            self.gateway.end()
            while self.gateway.waiting and not self.give_up.is_set():
                self._metrics()
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        finally:
            self._pool.shutdown()
            for target in self._targets:
                target.close()

    def _metrics(self) -> None:
        """One request. What it held waits on if it failed, and will be in another one."""
        held = self.gateway.batch(whole=self.finish.is_set())
        body = request(held)
        if self._rng.random() < 0.15:
            # A load balancer that answers the first request late and has sent it to another collector meanwhile.
            found = list(self._pool.map(lambda target: self._once(target, body), self._rng.sample(self._targets, 2)))
        else:
            found = [self._once(self._rng.choice(self._targets), body)]
        if any(found):
            self.gateway.acknowledged(held)
        else:
            time.sleep(self._rng.uniform(0.01, 0.1))

    def _until_acknowledged(self, body: Request) -> None:
        while not self.give_up.is_set() and not self._once(self._rng.choice(self._targets), body):
            time.sleep(self._rng.uniform(0.01, 0.1))

    def _steal(self) -> None:
        """A request by somebody whose credential is not good for it: nothing else than that may be the answer."""
        bad = self._rng.choice(self.access.bad)
        answer = self._rng.choice(self._targets).send(self.gateway.stolen(), bad.token)
        self.answers[f"{answer.name} to thieves"] += 1
        if answer.acknowledged:
            self.problems.append(f"a thief was let in; credential: {bad.what}")
        elif answer.problem and answer.name not in bad.answers:
            self.problems.append(f"to a thief: {answer.problem}; credential: {bad.what}")

    def _once(self, target: Target, body: Request) -> bool:
        """True if it was acknowledged."""
        answer = target.send(body, self.access.token)
        self.answers[answer.name] += 1
        if answer.problem:
            self.problems.append(answer.problem)
        return answer.acknowledged
