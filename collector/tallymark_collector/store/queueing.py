"""Who waits for the next transaction: one queue per tenant, bounded together, taken from in turn.

No I/O and no waiting in here. A tenant's next request always has a place; only what waits behind it is bounded. When
the room is full, whoever holds the most gives way: a tenant that holds less than another finds room at the cost of the
other's newest requests, and one that holds the most is refused. So a flood of one tenant cannot keep the others out,
and where nobody else waits one tenant may have all of the room. The room may be passed by one request of each tenant.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from tallymark_collector.errors import Overloaded


class Request:
    """What waits. Requests are told apart by being who they are."""

    __slots__ = ("bytes", "points", "since", "tenant")

    def __init__(self, tenant: str, points: int, size: int, since: float) -> None:
        """`points` counts whatever the request holds; `since` is a moment of the caller's clock, in seconds."""
        self.tenant: Final = tenant
        self.points: Final = max(points, 1)
        self.bytes: Final = max(size, 1)
        self.since: Final = since


R = TypeVar("R", bound=Request)


@dataclass(frozen=True, slots=True)
class Room:
    """Bounds on points and bytes together."""

    points: int
    bytes: int

    def weight(self, request: Request) -> int:
        """How much of the room a request takes, of `whole`; while the weights' sum is within that, points and bytes
        are within theirs. An integer, so that sums stay exact."""
        return max(request.points * self.bytes, request.bytes * self.points)

    @property
    def whole(self) -> int:
        """The weight of all of it."""
        return self.points * self.bytes


class FairQueue(Generic[R]):
    """Requests in the order of their arrival by tenant, tenants in turn."""

    def __init__(self, room: Room) -> None:
        self.points = 0
        """Points of all requests that wait."""
        self.bytes = 0
        """The same of their bytes."""
        self._room = room
        self._weight = 0
        self._held: dict[str, int] = {}
        self._tenants: OrderedDict[str, OrderedDict[R, None]] = OrderedDict()

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._tenants.values()))

    @property
    def oldest(self) -> float | None:
        """Since when the one waits that has waited longest."""
        return min((next(iter(requests)).since for requests in self._tenants.values()), default=None)

    def put(self, request: R) -> list[R]:
        """Adds a request; returns those that gave way to it. Raises Overloaded where nobody holds more."""
        leaving = self._makes_room(request.tenant)
        for gone in leaving:
            self.discard(gone)
        weight = self._room.weight(request)
        self._tenants.setdefault(request.tenant, OrderedDict())[request] = None
        self._held[request.tenant] = self._held.get(request.tenant, 0) + weight
        self._weight += weight
        self.points += request.points
        self.bytes += request.bytes
        return leaving

    def _makes_room(self, tenant: str) -> list[R]:
        """Who has to go for that tenant's next request: found before anyone goes, so that a refusal costs nobody's
        place."""
        excess = self._weight - self._room.whole
        if excess < 0:
            return []
        own = self._held.get(tenant, 0)
        held = {name: weight for name, weight in self._held.items() if len(self._tenants[name]) > 1}
        newest = {name: list(self._tenants[name])[1:] for name in held}
        leaving: list[R] = []
        while excess >= 0:
            most = max(held, key=held.__getitem__, default=tenant)
            if own >= held.get(most, 0):
                if not own:
                    break
                raise Overloaded(f"{self.points} points wait to be written, and nobody holds more of the queue")
            gone = newest[most].pop()
            leaving.append(gone)
            weight = self._room.weight(gone)
            excess -= weight
            held[most] -= weight
            if not newest[most]:
                del held[most]
        return leaving

    def discard(self, request: R) -> bool:
        """Takes a request out, if it still waits; True if it did."""
        requests = self._tenants.get(request.tenant)
        if requests is None or request not in requests:
            return False
        del requests[request]
        weight = self._room.weight(request)
        self.points -= request.points
        self.bytes -= request.bytes
        self._weight -= weight
        self._held[request.tenant] -= weight
        if not requests:
            del self._tenants[request.tenant]
            del self._held[request.tenant]
        return True

    def take(self, bounds: Room) -> list[R]:
        """Takes the next requests out, one of each tenant in turn, as many as the bounds hold; one at least."""
        taken: list[R] = []
        left = bounds.whole
        while self._tenants:
            tenant, requests = next(iter(self._tenants.items()))
            request = next(iter(requests))
            left -= bounds.weight(request)
            if taken and left < 0:
                break
            taken.append(request)
            self._tenants.move_to_end(tenant)
            self.discard(request)
        return taken
