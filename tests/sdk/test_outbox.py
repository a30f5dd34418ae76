from decimal import Decimal
from pathlib import Path

import pytest

from tallymark import parcels
from tallymark.batches import Request
from tallymark.outbox import Outbox
from tallymark.parcels import DamagedParcelError, NewerParcelError, Parcel


def parcel(*sizes: int, own: bool = True) -> Parcel:
    requests = [Request(bytes(size), 1, {"m": 1}) for size in sizes]
    return parcels.in_memory(requests, own, lambda: None)


def test_a_request_stays_until_it_is_acknowledged() -> None:
    outbox, ended = Outbox(), []
    both = parcels.in_memory([Request(b"1", 1, {}), Request(b"2", 1, {})], True, lambda: ended.append(1))
    outbox.put(both)
    first, second = both.batches
    assert outbox.head() is first
    assert outbox.head() is first
    outbox.acknowledge(first)
    outbox.acknowledge(first)
    assert not ended
    assert outbox.head() is second
    outbox.acknowledge(second)
    assert outbox.head() is None
    assert ended == [1]
    assert not outbox.full


def test_a_postponed_request_holds_up_nobody() -> None:
    outbox = Outbox()
    three = parcel(1, 1, 1)
    outbox.put(three)
    first, second, third = three.batches
    outbox.postpone(first, 60)
    assert outbox.head() is second
    outbox.acknowledge(second)
    outbox.acknowledge(third)
    assert outbox.head() is None
    assert outbox.batches() == (first,)
    outbox.postpone(first, 0)
    assert outbox.head() is first


def test_full_is_a_matter_of_bytes() -> None:
    outbox = Outbox(max_bytes=10)
    outbox.put(parcel(9))
    assert not outbox.full
    big = parcel(11)
    outbox.put(big)
    assert outbox.full
    outbox.acknowledge(big.batches[0])
    assert not outbox.full


def test_a_process_delivers_its_own_first_and_can_leave_the_rest() -> None:
    outbox = Outbox()
    found, own = parcel(1, own=False), parcel(1)
    outbox.put(found)
    outbox.put(own)
    assert outbox.head() is own.batches[0]
    outbox.forget_others()
    assert outbox.batches(own=False) == ()
    assert len(outbox) == 1


REQUESTS = [Request(b"one" * 100, 2, {"a": 1}), Request(b"two" * 100, 1, {"a": 3, "b": Decimal("0.1")})]


def test_a_parcel_keeps_bytes_and_what_was_handled(tmp_path: Path) -> None:
    path = tmp_path / "p.otlp"
    parcels.write(path, REQUESTS)
    assert [f.name for f in tmp_path.iterdir()] == ["p.otlp"]
    found, fault = parcels.read(lambda: path, True, path.unlink)
    assert fault is None
    assert [(b.read(), b.points, b.amounts) for b in found.batches] == [(r.body, r.points, r.amounts) for r in REQUESTS]
    found.handled(found.batches[0])
    again, _ = parcels.read(lambda: path, True, path.unlink)
    assert [b.read() for b in again.batches] == [REQUESTS[1].body]
    found.handled(found.batches[1])
    assert not path.exists()


def test_every_cut_off_parcel_is_known_as_one_and_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "p.otlp"
    parcels.write(path, REQUESTS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            found, fault = parcels.read(lambda: path, True, lambda: None)
        except DamagedParcelError:
            assert size < 16
            continue
        bodies = [b.read() for b in found.batches]
        assert bodies == [r.body for r in REQUESTS][: len(bodies)]
        assert (fault is None) == (size in (16, 16 + 16 + found_size(0)))


def found_size(n: int) -> int:
    return len(REQUESTS[n].body) + len(parcels._details(REQUESTS[n].points, REQUESTS[n].amounts))


def test_any_byte_that_flips_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.otlp"
    parcels.write(path, REQUESTS)
    whole = path.read_bytes()
    for at in [*range(0, 12), *range(16, 28), *range(32, len(whole), 37)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            found, fault = parcels.read(lambda: path, True, lambda: None)
        except DamagedParcelError:
            continue
        assert fault is not None or [b.read() for b in found.batches] != [r.body for r in REQUESTS]


def test_a_later_version_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "p.otlp"
    path.write_bytes(parcels._HEAD.pack(parcels.MAGIC, parcels.VERSION + 1, 0))
    with pytest.raises(NewerParcelError):
        parcels.read(lambda: path, True, lambda: None)
