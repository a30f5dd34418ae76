"""A full outbox: intervals are merged, usage stays, what may have been sent never changes, wherever a process dies."""

from __future__ import annotations

import os
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tallymark import merging, parcels
from tallymark.folder import SEGMENT, Folder, folders_in
from tallymark.merging import Merger
from tallymark.quantities import add
from tallymark.sums import CannotMergeError, Sums
from tests.sdk.dying_process import NOW, SECOND, Process, Stored, heir
from tests.sdk.full_outbox import TENTHS, check_intervals, cuts, files


@pytest.fixture
def collector() -> Stored:
    return Stored()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "service"


def test_neighbours_become_one_over_all_their_intervals(place: Path, collector: Stored) -> None:
    process = Process(place)
    cuts(process, 5)
    before = process.outbox.size
    process.merger.make_room(0)
    assert process.merger.merged == 4
    assert len(process.outbox) == 1
    assert process.outbox.size < before / 3
    assert len(files(place)) == 1
    process.deliver(collector)
    assert process.outbox.size == 0
    assert files(place) == []
    assert collector.totals() == {"m": Decimal("1.5")}
    assert {(start, end) for *_, start, end in collector.points()} == {(NOW, NOW + 5 * SECOND)}


def test_an_attempted_parcel_is_never_touched_again(place: Path, collector: Stored) -> None:
    process = Process(place)
    cuts(process, 7)
    process.outbox.acknowledge(process.outbox.batches()[3])  # the fourth is gone: its neighbours do not meet
    sent = process.outbox.head()
    assert sent is not None
    sent.parcel.note_attempt()
    bytes_sent = sent.read()
    path = sent.parcel.path()
    assert path is not None
    process.merger.make_room(0)
    assert [batch.points for batch in process.outbox.batches()] == [4, 4, 4], (
        "two accounts, or three, and the control total"
    )
    assert sent.read() == bytes_sent
    collector.stored.append(bytes_sent)  # its acknowledgement is lost with the process
    process.die()
    second = Process(place, "second", NOW + 60 * SECOND)
    second.recover()
    second.merger.make_room(0)
    assert path.exists(), "the note in the file says that it has been attempted"
    assert bytes_sent in [batch.read() for batch in second.outbox.batches(own=False)]
    second.deliver(collector)
    assert collector.totals() == {"m": Decimal("0.3") * 6}
    check_intervals(collector)


def test_a_disk_that_takes_no_note_does_not_keep_usage_from_leaving_it(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    process = Process(place)
    cuts(process, 3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        batch = process.outbox.head()
        assert batch is not None
        batch.parcel.note_attempt()
        collector.stored.append(batch.read())  # its acknowledgement is lost with the process
    process.die()
    second = Process(place, "second", NOW + 60 * SECOND)
    second.recover()
    second.merger.make_room(0)
    assert len(second.outbox) == 3, "the one that may have been sent, and the others with the note of the end"
    second.deliver(collector)
    assert collector.totals() == {"m": Decimal("0.9")}


def test_only_the_sender_or_the_merger_has_a_parcel(place: Path) -> None:
    process = Process(place)
    cuts(process, 3)
    first, second, third = process.outbox.never_attempted()
    assert process.outbox.claim([second, third])
    assert not process.outbox.claim([first, second])
    head = process.outbox.head()
    assert head is not None
    assert head.parcel is first
    process.outbox.acknowledge(head)
    assert process.outbox.head() is None
    assert not process.outbox.is_due()
    process.outbox.give_back([second, third])
    assert process.outbox.claim([second, third])


def test_a_collector_that_takes_nothing_leaves_half_of_the_outbox_to_be_merged(place: Path) -> None:
    process = Process(place, max_bytes=4000)
    cuts(process, 20)
    tried = 0
    while (batch := process.outbox.head()) is not None:
        process.outbox.postpone(batch, 60)
        tried += batch.size
    assert 2000 <= tried < 2600
    process.merger.make_room()
    assert process.outbox.size < 4000
    assert not process.outbox.is_due()


def test_what_was_kept_in_memory_may_have_been_sent(
    place: Path, collector: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    process = Process(place)
    cuts(process, 1)
    with monkeypatch.context() as patched:
        patched.setattr(parcels, "write", full)
        cuts(process, 1)
    cuts(process, 1)
    process.deliver(collector)  # every acknowledgement is lost with the process, that of the second for good
    assert len(files(place, SEGMENT)) == 1
    cut_files = collector.stored[:]
    collector.stored.clear()
    process = Process(place, "again")
    with monkeypatch.context() as patched:
        patched.setattr(parcels, "write", full)
        cuts(process, 3)
    batch = process.outbox.head()
    assert batch is not None
    collector.stored += [*cut_files, batch.read()]
    process.die()
    second = Process(place, "second", NOW + 60 * SECOND)
    second.recover()
    second.merger.make_room(0)
    second.deliver(collector)
    assert collector.totals() == {"m": Decimal("1.8")}


def test_a_clock_that_was_set_back_makes_no_overlap(place: Path, collector: Stored) -> None:
    process = Process(place)
    cuts(process, 3)
    process.now -= 100_000 * SECOND
    cuts(process, 3)
    process.merger.make_room(0)
    assert len(process.outbox) == 2
    process.deliver(collector)
    assert collector.totals() == {"m": Decimal("0.3") * 6}
    check_intervals(collector)


def test_running_totals_stay_as_they_were_last() -> None:
    def request(time: int, delta: int, total: int) -> bytes:
        message = ExportMetricsServiceRequest()
        metrics = message.resource_metrics.add().scope_metrics.add().metrics
        for temporality, start, value in ((1, time - 1, delta), (2, 1, total)):
            metric = metrics.add(name=f"m{temporality}")
            metric.sum.aggregation_temporality = temporality  # type: ignore[assignment]
            metric.sum.is_monotonic = True
            metric.sum.data_points.add(start_time_unix_nano=start, time_unix_nano=time, as_int=value)
        return message.SerializeToString()

    sums = Sums()
    for time, delta, total in ((10, 3, 3), (12, 5, 9), (11, 1, 4)):
        sums.take(request(time, delta, total))
    (merged,) = sums.requests()
    assert merged.amounts == {"m1": 9}
    found = {
        metric.name: [(p.start_time_unix_nano, p.time_unix_nano, p.as_int) for p in metric.sum.data_points]
        for resource in ExportMetricsServiceRequest.FromString(merged.body).resource_metrics
        for metric in resource.scope_metrics[0].metrics
    }
    assert found == {"m1": [(9, 12, 9)], "m2": [(1, 12, 9)]}


def test_what_is_no_sum_is_left_alone() -> None:
    message = ExportMetricsServiceRequest()
    message.resource_metrics.add().scope_metrics.add().metrics.add(name="g").gauge.data_points.add(as_int=1)
    with pytest.raises(CannotMergeError, match="'g'"):
        Sums().take(message.SerializeToString())


def test_a_service_that_restarts_all_the_time_stays_within_bounds(place: Path, collector: Stored) -> None:
    """An outage of a thousand intervals and forty processes: what is on the disk grows with the processes that ended,
    by one small file each, not with time."""
    now, lives, most = NOW, 40, 0
    for life in range(lives):
        process = Process(place, f"life-{life}", now, max_bytes=3000)
        process.recover()
        for _ in range(25):
            process.add(TENTHS, "account-1")
            if process.outbox.full:
                process.merger.make_room()
            if not process.outbox.full:
                process.cut()
            process.recover()
            most = max(most, len(files(place)))
        now = process.now
        process.die()
    assert most < lives + 40
    assert len(files(place, SEGMENT)) <= 1
    process = Process(place, "last", now, max_bytes=3000)
    for _ in range(200):
        process.recover()
        process.deliver(collector)
        if not folders_in(place):
            break
    assert collector.totals() == {"m": TENTHS * 25 * lives}
    check_intervals(collector)


amounts = st.integers(1, 10**6) | st.decimals(Decimal("0.01"), 10**6, places=2) | st.just(2**63 - 1)
step = (
    st.tuples(st.just("add"), st.sampled_from("abc"), amounts)
    | st.tuples(st.sampled_from(["cut", "cut", "cut", "merge", "send", "lose", "die"]))
    | st.tuples(st.just("clock"), st.integers(-(10**6), 10**6))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=50))
def test_whatever_happens_the_totals_stay(tmp_path_factory: pytest.TempPathFactory, script: list[Any]) -> None:
    """Usage, cuts, merging, answers, lost acknowledgements, deaths and a clock that jumps, in any order."""
    place = tmp_path_factory.mktemp("merging") / "service"
    collector = Stored()
    lives = 1
    process = Process(place, "life-1")
    want: dict[str, Any] = defaultdict(int)
    for name, *given_ in script:
        if name == "add":
            account, amount = given_
            process.add(amount, account)
            want[account] = add(want[account], amount)
        elif name == "cut":
            process.cut()
        elif name == "clock":
            process.now += given_[0] * SECOND // 1000
        elif name == "merge":
            process.merger.make_room(0)
        elif name in ("send", "lose"):
            batch = process.outbox.head()
            if batch is not None:
                batch.parcel.note_attempt()
                collector.stored.append(batch.read())
                if name == "send":
                    process.outbox.acknowledge(batch)
                else:
                    process.outbox.postpone(batch, 0)
        else:
            process.die()
            lives += 1
            process = Process(place, f"life-{lives}", process.now)
            process.recover()
    process.die()
    heir(place, collector, process.now + 60 * SECOND)
    got: dict[str, Any] = defaultdict(int)
    for (_, _, _, attributes, _, _), value in collector.points().items():
        ((_, account),) = attributes
        got[account[2:].decode()] = add(got[account[2:].decode()], value)
    assert got == want


def test_a_folder_that_was_let_go_of_is_not_touched(place: Path, collector: Stored) -> None:
    dead = Process(place)
    cuts(dead, 4)
    dead.die()
    process = Process(place, "first")
    process.recover()
    (group,) = process.merger._groups()
    process.recovery.release()
    assert not process.merger._merge(group)
    assert len(files(place)) == 5, "the last one says that the producer has ended"
    heir(place, collector)
    assert collector.totals() == {"m": Decimal("1.2")}


def test_parcels_of_the_first_version_count_as_attempted(place: Path) -> None:
    process = Process(place)
    cuts(process, 2)
    process.die()
    for path in files(place):
        data = path.read_bytes()
        path.write_bytes(data[:8] + (1).to_bytes(4, "little") + bytes(4) + data[16:])
    second = Process(place, "second")
    second.recover()
    assert len(second.outbox) == 3, "the last one says that the producer has ended"
    assert [parcel.number for parcel in second.outbox.never_attempted()] == [3]


def test_a_merged_parcel_says_what_it_replaces(tmp_path: Path) -> None:
    folder = Folder.create(tmp_path)
    parcels.write(folder.parcel(3), [], replaces=[1, 2])
    assert parcels.replaced_by(folder.parcel(3)) == [1, 2]
    folder.parcel(1).touch()
    folder.segment(2).touch()
    merging.complete(folder)
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000003.otlp", "lock"]
    folder.release()


def test_merging_is_refused_where_a_segment_is_still_there(place: Path) -> None:
    process = Process(place)
    cuts(process, 2)
    folder = process.journal._folder
    assert folder is not None
    folder.segment(1).touch()
    assert isinstance(process.merger, Merger)
    process.merger.make_room(0)
    assert len(files(place)) == 2
