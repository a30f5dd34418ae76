"""Control totals: at each moment at which a process may die they say what it had recorded, and never more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource

from tallymark import segment, totals
from tallymark.batches import producer_record, requests_of
from tallymark.folder import folders_in
from tallymark.journal import Journal
from tallymark.meters import Meter
from tallymark.packing import Packer
from tallymark.quantities import EXACT, Exact, exact
from tallymark.recorder import MAX_BACKWARD_NS, Recorder
from tallymark.segment import Segment
from tallymark.streams import Series
from tallymark.totals import Totals
from tests.sdk.dying_process import NOW, SECOND, Killed, Process, Stored, at_step, heir

SERIES = [Series(Meter("m", "1"), ()), Series(Meter("n", "By"), (("a", "string", "x"),))]
ON_SPANS = Series(SERIES[0].meter, (), evidence=True)
Final = dict[tuple[str, str], Decimal]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


@pytest.fixture
def collector() -> Stored:
    return Stored()


def finals(collector: Stored) -> Final:
    """By (producer, meter): the last total of each run, added up."""
    runs: dict[tuple[str, str, int], tuple[int, Decimal]] = {}
    for (producer, meter, _, since, at), total in collector.control().items():
        key = (producer, meter, since)
        runs[key] = max(runs.get(key, (0, Decimal(0))), (at, total))
    found: Final = {}
    for (producer, meter, _), (_, total) in runs.items():
        found[producer, meter] = EXACT.add(found.get((producer, meter), Decimal(0)), total)
    return found


def is_proved(collector: Stored) -> None:
    """At each control total the points until then are what it says, and it never falls within a run."""
    points = collector.points()
    control = collector.control()
    times = sorted({(producer, meter, at) for producer, meter, _, _, at in control})
    for producer, meter, at in times:
        runs: dict[int, Decimal] = {}
        for (one, name, _, since, then), total in sorted(control.items(), key=lambda item: item[0][4]):
            if (one, name) == (producer, meter) and then <= at:
                assert total >= runs.get(since, Decimal(0))
                runs[since] = total
        counted = Decimal(0)
        for (one, name, _, _, _, end), value in points.items():
            if (one, name) == (producer, meter) and end <= at:
                counted = EXACT.add(counted, value)
        told = Decimal(0)
        for total in runs.values():
            told = EXACT.add(told, total)
        assert told == counted, (producer, meter, at)
    last = {}
    for producer, _, _, since, at in control:
        last[producer, since] = max(last.get((producer, since), 0), at)
    for key, at in collector.closed().items():
        assert at >= last.get(key, 0), "no total comes after the last"


def test_totals_grow_from_interval_to_interval(place: Path, collector: Stored) -> None:
    process = Process(place)
    for amount in (2, 0.5, 3):
        process.add(amount)
        process.cut()
    process.recorder.add((SERIES[1], "acme", None), 7)
    process.cut()
    process.deliver(collector)
    mine = sorted((at - NOW, meter, total) for (_, meter, _, _, at), total in collector.control().items())
    assert mine == [
        (1 * SECOND, "m", 2),
        (2 * SECOND, "m", Decimal("2.5")),
        (3 * SECOND, "m", Decimal("5.5")),
        (4 * SECOND, "m", Decimal("5.5")),
        (4 * SECOND, "n", 7),
    ]
    assert {since for _, _, _, since, _ in collector.control()} == {NOW}
    assert collector.closed() == {}
    is_proved(collector)


@pytest.mark.parametrize(
    "amounts",
    [[2**63 - 1] * 3, ["1e-30", 2**63 - 1, 2**62], ["0.12345678901234567890123"] * 5, [0.1] * 30, ["1e-29", 1]],
)
def test_a_total_that_no_value_can_carry_is_exact(place: Path, collector: Stored, amounts: list[Any]) -> None:
    process = Process(place)
    want = Decimal(0)
    for amount in amounts:
        number = Decimal(amount) if isinstance(amount, str) else amount
        process.add(number)
        process.cut()
        want = EXACT.add(want, Decimal(str(number)))
    process.deliver(collector)
    assert finals(collector) == {("i", "m"): want}
    is_proved(collector)


def test_an_orderly_end_is_noted_once_and_leaves_nothing(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    assert not process.journal.note_end(process.recorder), "usage waits: more totals will come"
    process.cut()
    process.deliver(collector)
    assert process.journal.note_end(process.recorder)
    assert not process.journal.note_end(process.recorder)
    process.deliver(collector)
    process.journal.close(process.recorder)
    assert folders_in(place) == []
    assert collector.closed() == {("i", NOW): NOW + SECOND}
    assert finals(collector) == {("i", "m"): 5}


def test_a_process_that_records_nothing_notes_nothing(place: Path) -> None:
    process = Process(place)
    assert not process.journal.note_end(process.recorder)


def test_an_end_that_there_was_no_time_to_note_is_noted_by_an_heir(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.cut()
    process.deliver(collector)  # after the shutdown had given up waiting for it
    process.journal.close(process.recorder)
    process.die()
    heir(place, collector)
    assert collector.closed() == {("i", NOW): NOW + SECOND}
    assert finals(collector) == {("i", "m"): 5}


def test_usage_after_the_end_counts_on_and_is_closed_again(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.cut()
    process.deliver(collector)
    process.journal.note_end(process.recorder)
    process.deliver(collector)
    process.journal.close(process.recorder)
    process.add(2)
    process.die()
    heir(place, collector)
    assert finals(collector) == {("i", "m"): 7}
    (closed,) = collector.closed().values()
    assert closed == max(at for _, _, _, _, at in collector.control())
    is_proved(collector)


def test_another_configuration_is_another_producer_and_closes_the_first(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.cut()
    process.add(2)  # after shutdown(), before configure(): still of the first
    other = producer_record(Resource({"service.instance.id": "second"}), "tallymark", "1")
    process.now += SECOND
    process.journal.open(place, other, 10 * SECOND, process.recorder)
    process.add(11)
    process.cut()
    process.deliver(collector)
    assert finals(collector) == {("i", "m"): 7, ("second", "m"): 11}
    assert {producer for producer, _ in collector.closed()} == {"i"}
    is_proved(collector)


def test_usage_from_before_configure_is_in_the_totals(place: Path, collector: Stored) -> None:
    process = Process(place)
    journal = Journal(process.outbox, process.packer, process.packer._reporter, lambda: process.now)
    recorder = Recorder(NOW, journal.new_segment)
    recorder.add((SERIES[0], "acme", None), 4)
    process.now += SECOND
    journal.open(place, process.producer, 10 * SECOND, recorder)
    process.journal, process.recorder = journal, recorder
    process.add(3)
    process.die()
    process.deliver(collector)
    heir(place, collector)
    assert finals(collector) == {("i", "m"): 7}
    assert len(collector.closed()) == 1
    is_proved(collector)


def test_a_clock_that_was_set_back_begins_another_run_and_ends_the_first(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.cut()
    process.add(7)
    process.now -= MAX_BACKWARD_NS * 3
    process.cut()
    process.add(1)
    process.cut()
    process.deliver(collector)
    assert finals(collector) == {("i", "m"): 13}
    assert collector.closed() == {("i", NOW): NOW + SECOND}
    process.die()
    heir(place, collector)
    assert len(collector.closed()) == 2
    is_proved(collector)


def test_runs_that_are_merged_into_one_parcel_keep_their_ends_each(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.cut()
    process.now -= MAX_BACKWARD_NS * 3
    process.add(2)
    process.cut()  # says that the first run is over, whose time is later than all that follows
    process.add(3)
    process.die()
    second = Process(place, "second", process.now + 60 * SECOND)
    second.recover()
    second.merger.make_room(0)
    assert second.merger.merged == 1
    second.deliver(collector)
    assert finals(collector) == {("i", "m"): 10}
    assert len(collector.closed()) == 2


def test_a_full_disk_parts_no_totals(place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(place)
    process.add(1)
    real = Segment.append

    def full(self: Segment, *args: Any, **kwargs: Any) -> Any:
        if self.path is not None:
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Segment, "append", full)
    process.add(2, "globex")  # in memory: a second segment of the same interval
    process.cut()
    process.add(4)
    monkeypatch.undo()
    process.cut()
    process.add(8)
    process.cut()
    process.deliver(collector)
    assert finals(collector) == {("i", "m"): 15}
    assert collector.totals() == {"m": 15}
    is_proved(collector)


def test_a_process_that_went_on_in_memory_is_not_closed_by_its_heir(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(place)
    process.add(1)
    real = Segment.__init__

    def no_files(self: Segment, path: Path | None, *args: Any, **kwargs: Any) -> None:
        if path is not None:
            raise OSError(28, "No space left on device")
        real(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "__init__", no_files)
        patch.setattr(Packer, "pack", lambda *args, **kwargs: None)
        process.cut()
    process.add(2)  # lost with the process, and nobody can know
    process.die()
    heir(place, collector)
    assert finals(collector) == {("i", "m"): 1}
    assert collector.closed() == {}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Recorder, "carry"), (Segment, "carry"), (Journal, "_count"), (Recorder, "cut"), (Segment, "end")],
)
def test_killed_between_the_exchange_and_the_record_of_what_was_before(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
) -> None:
    process = Process(place)
    process.add(0.1)
    process.cut()
    process.add(5)
    at_step(monkeypatch, owner, name, after=after)
    with pytest.raises(Killed):
        process.cut()
    process.add(3)
    process.die()
    process.deliver(collector)
    heir(place, collector)
    assert finals(collector) == {("i", "m"): Decimal("8.1")}
    assert len(collector.closed()) == 1
    is_proved(collector)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [(segment, "carry"), (segment, "seal"), (Packer, "pack"), (Path, "unlink")])
def test_heirs_that_are_killed_come_to_the_same_totals(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], after: bool
) -> None:
    process = Process(place)
    process.add(5)
    with monkeypatch.context() as patch:
        at_step(patch, Recorder, "carry", after=False)
        with pytest.raises(Killed):
            process.cut()
    process.add(3)
    process.die()
    first = Process(place, "first", NOW + 30 * SECOND)
    with monkeypatch.context() as patch:
        at_step(patch, *step, after=after)
        with pytest.raises(Killed):
            first.recover()
    first.die()
    heir(place, collector)
    assert finals(collector) == {("i", "m"): 8}
    assert len(collector.closed()) == 1
    is_proved(collector)


def test_a_half_written_record_does_not_damage_what_an_heir_writes(tmp_path: Path) -> None:
    made = Segment(tmp_path / "1.segment", NOW, SECOND)
    made.append(segment.STREAM, b'["m","1",null,null,[]]', 0, 5)
    mapped, _ = made._chunks[0]
    mapped[made._used + 8 : made._used + 4000] = b"\xff" * 3992  # all of a record but its size
    made.close()
    last = Totals(1, 2, {("m", "1"): 3})
    segment.carry(tmp_path / "1.segment", totals.encode(last))
    found = segment.read(tmp_path / "1.segment")
    assert not found.damaged
    assert totals.decode(found.base) == last
    assert [units for sums in found.sums.values() for units in sums.values()] == [5]


def test_many_meters_are_carried_in_several_records(tmp_path: Path) -> None:
    many = Totals(1, 2, {(f"{'m' * 250}{n:05}", "x" * 63): 2**63 + n for n in range(2500)})
    bodies = list(totals.encode(many))
    assert len(bodies) == 3
    assert totals.decode(bodies[:2]) is None, "a part is not the whole"
    assert totals.decode([*bodies[:2], *bodies]) == many
    made = Segment(tmp_path / "1.segment", NOW, SECOND)
    made.carry(bodies)
    assert totals.decode(made.contents().base) == many
    made.close()


def test_a_segment_of_the_first_version_is_read_and_proves_nothing(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    folder = process.journal.where()
    assert folder is not None
    process.die()
    (path,) = folder.glob("*.segment")
    data = bytearray(path.read_bytes())
    records = bytes(data[64:])
    kept = [data[:64]]
    for record in _raw_records(records):
        if record[16] != segment.BASE:
            kept.append(record)
    start, interval = (int.from_bytes(data[at : at + 8], "little") for at in (16, 24))
    import struct
    import zlib

    crc = zlib.crc32(struct.pack("<8sIqq", b"TALLYSEG", 1, start, interval))
    kept[0][8:16] = struct.pack("<II", 1, crc)
    path.write_bytes(b"".join(bytes(piece) for piece in kept).ljust(len(data), b"\0"))
    heir(place, collector)
    assert collector.totals() == {"m": 5}
    assert (collector.control(), collector.closed()) == ({}, {})


def _raw_records(data: bytes) -> Iterator[bytearray]:
    offset = 0
    while size := int.from_bytes(data[offset : offset + 4], "little"):
        yield bytearray(data[offset : offset + size])
        offset += size


def test_evidence_is_in_no_total_and_no_sum(place: Path, collector: Stored) -> None:
    process = Process(place)
    process.add(5)
    process.recorder.add((ON_SPANS, "acme", None), 3)
    process.recorder.add((ON_SPANS, "acme", None), exact(0.5))
    assert {stream.meter: total for stream, total in process.recorder.sums().items()} == {"m": 5}
    process.cut()
    (batch,) = process.outbox.batches()
    assert batch.amounts == {"m": 5}
    process.recorder.add((ON_SPANS, "acme", None), 2)  # its usage was in the interval before
    process.die()
    process.deliver(collector)
    heir(place, collector)
    assert finals(collector) == {("i", "m"): 5}
    assert collector.totals() == {"m": 5}
    assert collector.evidence() == {("acme", "m"): Decimal("5.5")}
    is_proved(collector)


def test_past_the_limit_of_streams_evidence_does_not_become_usage() -> None:
    recorder = Recorder(0, max_streams=1)
    recorder.add((SERIES[1], "acme", None), 5)
    recorder.add((Series(SERIES[1].meter, (), evidence=True), "acme", None), 3)
    (taken,) = recorder.cut(10**10)
    found = {(stream.evidence, stream.account): n for stream, n in _sums(taken).items()}
    assert found == {(False, "acme"): 5, (True, "acme"): 3}


def _sums(taken: Segment) -> dict[Any, Exact]:
    from tallymark.recorder import total_of

    return total_of(taken.contents())


def test_the_same_segment_gives_the_same_bytes(place: Path) -> None:
    process = Process(place)
    process.add(Decimal("0.12345678901234567890123"))
    process.cut()
    process.add(2**63 - 1)
    process.recorder.add((ON_SPANS, "acme", None), 1)
    (taken,) = process.recorder.cut(NOW + 5 * SECOND)
    assert taken.path is not None
    of_owner = list(requests_of(taken.contents(), process.producer))
    of_heir = list(requests_of(segment.read(taken.path), b""))
    assert [r.body for r in of_owner] == [r.body for r in of_heir]
    assert b"tallymark.control.total" in of_owner[-1].body


quantities = st.integers(1, 2**63 - 1) | st.integers(1, 9) | st.decimals(Decimal("1e-30"), 10**18, places=30)
steps = st.one_of(
    st.tuples(st.just("add"), st.sampled_from([0, 1]), quantities),
    st.tuples(st.just("cut")),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("kill"), st.sampled_from(["cut", "carry", "count", "anywhere"])),
    st.tuples(st.just("end")),
    st.tuples(st.just("clock"), st.integers(-200, 200)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=1, max_size=40))
def test_whatever_happens_the_final_totals_are_what_was_recorded(plan: list[Any]) -> None:
    """Each process that follows a killed or ended one is a producer of its own, as a forked child is."""
    want: Final = {}
    collector = Stored()
    with TemporaryDirectory() as folder:
        place = Path(folder) / "service"
        names = iter(f"p{n}" for n in range(100))
        name = next(names)
        process = Process(place, name)
        ended: set[str] = set()

        def another() -> Process:
            nonlocal name
            ended.add(name)
            name = next(names)
            following = Process(place, name, process.now + 20 * SECOND)
            following.recover()
            return following

        for step in plan:
            if step[0] == "add":
                stream = SERIES[step[1]]
                process.recorder.add((stream, "acme", None), exact(step[2]))
                key = (name, stream.meter.name)
                want[key] = EXACT.add(want.get(key, Decimal(0)), Decimal(step[2]))
            elif step[0] == "cut":
                process.cut()
            elif step[0] == "deliver":
                process.deliver(collector)
            elif step[0] == "clock":
                process.now += step[1] * SECOND
            elif step[0] == "end":
                process.cut()
                process.deliver(collector)
                process.journal.note_end(process.recorder)
                process.deliver(collector)
                process.journal.close(process.recorder)
                process.die()
                process = another()
            else:
                with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                    for where, owner, method in (
                        ("cut", Recorder, "cut"),
                        ("carry", Recorder, "carry"),
                        ("count", Journal, "_count"),
                    ):
                        if step[1] == where:
                            at_step(patch, owner, method, after=True)
                            process.cut()
                process.die()
                process = another()
        process.die()
        ended.add(name)
        heir(place, collector, process.now + 1000 * SECOND)
    assert finals(collector) == want
    is_proved(collector)
    assert {producer for producer, _ in collector.closed()} == {producer for producer, _ in want}
