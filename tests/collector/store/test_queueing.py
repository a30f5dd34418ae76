"""Who waits, who gives way, who is next."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_collector.errors import Overloaded
from tallymark_collector.store.queueing import FairQueue, Request, Room

EVERYTHING = Room(2**40, 2**40)


def request(tenant: str = "a", points: int = 1, size: int = 1, since: float = 0) -> Request:
    return Request(tenant, points, size, since)


def filled(room: Room, *requests: Request) -> FairQueue[Request]:
    queue: FairQueue[Request] = FairQueue(room)
    for one in requests:
        assert queue.put(one) == []
    return queue


def test_one_tenant_may_have_all_of_the_room_and_is_then_refused() -> None:
    queue = filled(Room(10, 1000), *(request() for _ in range(10)))
    with pytest.raises(Overloaded, match="10 points wait"):
        queue.put(request())
    assert len(queue) == queue.points == 10


def test_bytes_are_bounded_like_points() -> None:
    queue = filled(Room(1000, 10), request(size=5), request(size=5))
    with pytest.raises(Overloaded):
        queue.put(request())


def test_a_flood_gives_way_to_another_tenant_newest_first() -> None:
    flood = [request("flood") for _ in range(10)]
    queue = filled(Room(10, 1000), *flood)
    gone = [one for _ in range(5) for one in queue.put(request("quiet"))]
    assert gone == flood[:4:-1]
    with pytest.raises(Overloaded):
        queue.put(request("quiet"))
    with pytest.raises(Overloaded):
        queue.put(request("flood"))
    assert queue.points == 10


def test_a_request_that_is_refused_costs_nobody_a_place() -> None:
    queue = filled(Room(10, 1000), *(request("a", points=3) for _ in range(3)), request("b"))
    with pytest.raises(Overloaded):
        queue.put(request("a"))
    assert len(queue) == 4


def test_a_tenants_next_request_always_has_a_place_and_keeps_it() -> None:
    giants = [request(f"tenant-{i}", points=1000) for i in range(5)]
    queue = filled(Room(10, 1000), *giants)
    assert queue.take(EVERYTHING) == giants


def test_tenants_take_turns() -> None:
    queue = filled(Room(100, 1000), *(request("a", since=i) for i in range(6)), request("b"), request("c"))
    assert [one.tenant for one in queue.take(Room(5, 1000))] == ["a", "b", "c", "a", "a"]
    assert [one.since for one in queue.take(EVERYTHING)] == [3, 4, 5]


def test_a_turn_goes_on_where_the_last_group_ended() -> None:
    queue = filled(Room(100, 1000), *(request(tenant, points=5) for _ in range(2) for tenant in "abc"))
    taken = [[one.tenant for one in queue.take(Room(10, 1000))] for _ in range(3)]
    assert taken == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_a_request_larger_than_a_group_is_one() -> None:
    queue = filled(Room(100, 1000), request(points=50), request())
    assert [one.points for one in queue.take(Room(10, 1000))] == [50]
    assert [one.points for one in queue.take(Room(10, 1000))] == [1]
    assert queue.take(Room(10, 1000)) == []


def test_the_oldest_is_found_among_all_tenants() -> None:
    queue = filled(Room(100, 1000), request("a", since=5), request("b", since=3), request("a", since=1))
    assert queue.oldest == 3
    queue.take(EVERYTHING)
    assert queue.oldest is None


def test_who_hangs_up_leaves_room() -> None:
    one, other = request(points=6), request(points=4)
    queue = filled(Room(10, 1000), one, other)
    queue.discard(one)
    queue.discard(one)
    assert (queue.points, len(queue)) == (4, 1)
    assert queue.put(request(points=6)) == []


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abcd"), st.integers(1, 30), st.integers(1, 30)),
            st.tuples(st.just("take"), st.just(""), st.integers(1, 60), st.integers(1, 60)),
            st.tuples(st.just("discard"), st.just(""), st.integers(0, 50), st.just(1)),
        ),
        max_size=60,
    )
)
def test_whatever_happens(steps: list[tuple[str, str, int, int]]) -> None:
    """Nothing is lost or doubled, a tenant's own order is kept, and the room is passed by one request a tenant."""
    room = Room(100, 100)
    queue: FairQueue[Request] = FairQueue(room)
    waiting: list[Request] = []
    for number, (what, tenant, points, size) in enumerate(steps):
        if what == "put":
            one = request(tenant, points, size, number)
            held = {t: sum(room.weight(r) for r in waiting if r.tenant == t) for t in "abcd"}
            try:
                gone = queue.put(one)
            except Overloaded:
                assert held[tenant] == max(held.values()) or held[tenant] > 0, "one with nothing waiting gets in"
                assert sum(held.values()) >= room.whole
                continue
            for left in gone:
                assert held[left.tenant] > held[tenant], "only who holds more gives way"
                waiting.remove(left)
            waiting.append(one)
        elif what == "take":
            taken = queue.take(Room(points, size))
            assert len(taken) <= 1 or sum(r.points for r in taken) <= points
            assert len(taken) <= 1 or sum(r.bytes for r in taken) <= size
            assert bool(taken) == bool(waiting)
            for one in taken:
                assert one is next(r for r in waiting if r.tenant == one.tenant), "in its tenant's order"
                waiting.remove(one)
        elif waiting:
            queue.discard(waiting.pop(points % len(waiting)))
        assert len(queue) == len(waiting)
        assert queue.points == sum(r.points for r in waiting)
        assert queue.oldest == min((r.since for r in waiting), default=None)
        newest = {
            t: list(group)[-1] for t, group in groupby(sorted(waiting, key=lambda r: r.tenant), lambda r: r.tenant)
        }
        assert sum(r.points for r in waiting if r not in newest.values()) < 2 * room.points
