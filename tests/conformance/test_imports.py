"""Files that are imported again, grown, renamed, cut, compressed, in pieces and at once: each line is billed once."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from random import Random

import psycopg
import pytest

from tallymark_collector.aggregates.audit import audit
from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.imports.mapping import parse_mapping
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tallymark_collector.store import Store, imports
from tallymark_collector.store.imports import Progress
from tests.support.logs import (
    DAY,
    EVENTS,
    LOG_MAPPING,
    NOW_NS,
    billed,
    fetch,
    import_,
    line,
    some_lines,
    sums,
)

LINES = some_lines(500, Random(7))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "access.log"
    file.write_text("".join(LINES))
    return file


async def test_a_file_is_billed_once_however_often_it_is_imported(store: Store, dsn: str, log: Path) -> None:
    first = await import_(store, log, piece_lines=64)
    assert (first.lines, first.accepted, first.before, first.duplicates) == (500, 500, 0, 0)
    assert len(set(LINES)) < 500, "some lines are the same, and each of them is a call"
    assert billed(dsn) == sums(LINES)
    assert {(a, m): q for a, m, _, q in first.rows()} == sums(LINES)
    again = await import_(store, log)
    assert (again.lines, again.accepted, again.before) == (0, 0, 500)
    assert billed(dsn) == sums(LINES)


async def test_the_hours_are_right_and_the_audit_finds_nothing(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log)
    while await store.refresh():
        pass
    async with store.reading() as connection:
        report = await audit(connection)
    assert report.clean
    assert report.points == len(LINES) + sum(" 200 -" not in each for each in LINES)
    [(total,)] = fetch(dsn, "SELECT sum(quantity) FROM usage_hourly WHERE meter = 'egress'")
    assert total == sum(value for (_, meter), value in sums(LINES).items() if meter == "egress")


async def test_a_grown_file_is_read_on(store: Store, dsn: str, log: Path) -> None:
    log.write_text("".join(LINES[:300]))
    await import_(store, log)
    with log.open("a") as opened:
        opened.write("".join(LINES[300:]))
    grown = await import_(store, log)
    assert (grown.before, grown.lines, grown.accepted, grown.duplicates) == (300, 200, 200, 0)
    assert billed(dsn) == sums(LINES)
    assert fetch(dsn, "SELECT count(*), max(lines), max(bytes) FROM usage_import_file") == [
        (1, 500, log.stat().st_size)
    ]


async def test_a_renamed_and_compressed_file_is_the_same(store: Store, dsn: str, log: Path, tmp_path: Path) -> None:
    log.write_text("".join(LINES[:300]))
    await import_(store, log)
    rotated = tmp_path / "access.log.1.gz"
    rotated.write_bytes(gzip.compress("".join(LINES).encode()))
    summary = await import_(store, rotated)
    assert (summary.before, summary.accepted, summary.duplicates) == (300, 200, 0)
    assert billed(dsn) == sums(LINES)
    assert fetch(dsn, "SELECT path FROM usage_import_file") == [(str(rotated),)]


@pytest.mark.parametrize("cut", [1, 3, 250, 499])
async def test_a_file_that_was_cut_at_the_front(store: Store, dsn: str, log: Path, cut: int) -> None:
    """What is left of it has been billed; what is new has not."""
    await import_(store, log)
    more = [line(1000 + n) for n in range(5)]
    log.write_text("".join(LINES[cut:] + more))
    summary = await import_(store, log)
    assert (summary.before, summary.duplicates, summary.accepted) == (0, 500 - cut, 5)
    assert billed(dsn) == sums(LINES + more)


async def test_the_same_lines_in_two_rotated_files(store: Store, dsn: str, tmp_path: Path) -> None:
    older, newer = tmp_path / "access.log.2", tmp_path / "access.log.1"
    older.write_text("".join(LINES[:300]))
    newer.write_text("".join(LINES[200:]))
    summary = await import_(store, newer, older)
    # At the edges of the second that both hold a part of, identical lines count as in the file that has most of them.
    assert summary.accepted == 500 - _split_twins(LINES, 200, 300)
    assert summary.duplicates == 100 + _split_twins(LINES, 200, 300)


def _split_twins(lines: list[str], start: int, end: int) -> int:
    """Of each line that stands in both files, those that only the other one adds, counted line by line."""
    lost = 0
    for text in set(lines):
        in_older, in_newer = lines[:end].count(text), lines[start:].count(text)
        lost += lines.count(text) - max(in_older, in_newer)
    return lost


async def test_two_servers_may_log_the_same_line(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log, source="web-1")
    await import_(store, log, source="web-2", again=True)
    assert billed(dsn) == {key: 2 * value for key, value in sums(LINES).items()}
    assert fetch(
        dsn, "SELECT source, count(*) FROM usage_lines WHERE meter = 'api.requests' GROUP BY 1 ORDER BY 1"
    ) == [
        ("web-1", 500),
        ("web-2", 500),
    ]


async def test_a_last_line_that_is_still_being_written(store: Store, dsn: str, log: Path) -> None:
    whole = "".join(LINES)
    log.write_text(whole[:-40])
    first = await import_(store, log)
    assert (first.accepted, first.left) == (499, 1)
    log.write_text(whole)
    second = await import_(store, log)
    assert (second.accepted, second.before, second.left) == (1, 499, 0)
    assert billed(dsn) == sums(LINES)


async def test_a_last_line_without_end_is_taken_when_it_is_said_to_be_whole(store: Store, dsn: str, log: Path) -> None:
    log.write_text("".join(LINES).rstrip("\n"))
    assert (await import_(store, log, final=True)).accepted == 500
    again = await import_(store, log)
    assert (again.accepted, again.before, again.left) == (0, 500, 0)
    log.write_text("".join([*LINES, line(2000)]))
    grown = await import_(store, log)
    assert (grown.before, grown.accepted, grown.duplicates) == (500, 1, 0)
    assert billed(dsn) == sums([*LINES, line(2000)])


async def test_a_last_line_that_was_not_whole_after_all_is_refused(store: Store, dsn: str, log: Path) -> None:
    mapping = parse_mapping("format: common\naccount: user\nmeters: [{meter: egress, unit: By, field: bytes}]\n")
    common = '1.1.1.1 - acme [01/Sep/2026:00:00:00 +0000] "GET / HTTP/1.1" 200 12'
    log.write_text(common)
    await import_(store, log, mapping=mapping, final=True)
    log.write_text(common + "345\n")
    with pytest.raises(
        UserError, match=r"line 1 of .* was not whole when it was imported with --final, and has gone on"
    ):
        await import_(store, log, mapping=mapping)
    assert billed(dsn) == {("acme", "egress"): Decimal(12)}


async def test_another_mapping_is_refused_with_what_differs(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log)
    other = parse_mapping(LOG_MAPPING.replace("account: user", "account: host"))
    with pytest.raises(UserError, match="the source 'web-1' was imported with another mapping: account differ"):
        await import_(store, log, mapping=other)
    assert billed(dsn) == sums(LINES)


async def test_every_number_leads_to_its_lines(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log)
    rows = fetch(
        dsn, f"SELECT account, line, quantity FROM usage_lines WHERE meter = 'egress' AND file = '{log}' ORDER BY line"
    )
    expected = [
        (text.split(" ")[2], number, Decimal(text.split(" ")[9]))
        for number, text in enumerate(LINES, 1)
        if text.split(" ")[9] != "-"
    ]
    assert rows == expected


# Events with ids


def event(id_: str, tokens: object = 5, customer: str = "acme", second: int = 0) -> str:
    at = (DAY + timedelta(seconds=second)).isoformat()
    return json.dumps({"id": id_, "at": at, "customer": customer, "tokens": tokens}) + "\n"


async def test_an_id_bills_once_in_whatever_file(store: Store, dsn: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(event("1") + event("2") + event("1"))
    second.write_text(event("3") + event("2"))
    summary = await import_(store, first, second, mapping=EVENTS)
    assert (summary.accepted, summary.duplicates, summary.conflicts) == (3, 2, 0)
    assert billed(dsn) == {("acme", "llm.tokens"): Decimal(15)}


@pytest.mark.parametrize("other", [{"tokens": 6}, {"customer": "globex"}, {"second": 1}, {"second": 7200}])
@pytest.mark.parametrize("piece", [1, 100])
async def test_an_id_with_other_values_is_kept_aside(
    store: Store, dsn: str, tmp_path: Path, other: dict[str, object], piece: int
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(event("1") + event("2") + event("1", **other))  # type: ignore[arg-type]
    summary = await import_(store, file, mapping=EVENTS, piece_lines=piece)
    assert (summary.accepted, summary.duplicates, summary.conflicts) == (2, 0, 1)
    assert billed(dsn) == {("acme", "llm.tokens"): Decimal(10)}
    [(reason, detail, payload)] = fetch(dsn, "SELECT reason, detail, payload FROM usage_quarantine")
    assert (reason, detail) == ("value_conflict", f"line 1 of {file} had the same id and other values")
    [kept] = decode_metrics("default", payload, StreamCache(), TimeLimits(), NOW_NS).points  # type: ignore[arg-type]
    assert (kept.stream.series.account, kept.value) == (other.get("customer", "acme"), other.get("tokens", 5))
    streams = {row[0] for row in fetch(dsn, "SELECT stream FROM usage_stream")}
    assert kept.stream.id in streams or "customer" in other, "it is a point of the stream that it contradicts"


def forget_before(dsn: str, hours: float) -> None:
    """What dropping old points leaves behind."""
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        connection.execute("UPDATE usage_kept SET points_from = %s", [DAY + timedelta(hours=hours)])


async def test_lines_too_old_to_be_told_from_dropped_ones(store: Store, dsn: str, log: Path) -> None:
    lines = [*LINES, *(line(3600 + n) for n in range(5))]
    log.write_text("".join(lines))
    forget_before(dsn, 0.5)
    with pytest.raises(UserError, match=r"points before 2026-09-01T01:00:00\+00:00 have been dropped"):
        await import_(store, log, oldest=DAY)
    late = await import_(store, log, oldest=DAY + timedelta(hours=1))
    assert (late.accepted, late.rejected) == (5, 500)
    assert billed(dsn) == sums(lines[500:])
    assert fetch(dsn, "SELECT count(*) FROM usage_quarantine") == [(0,)]


async def test_points_that_are_dropped_while_an_import_is_under_way(store: Store, dsn: str, log: Path) -> None:
    class Dropping(Failing):
        async def write(self, batch: object, beside: object) -> object:  # type: ignore[override]
            forget_before(dsn, 1)
            return await store.write(batch, beside)  # type: ignore[arg-type]

    summary = await import_(Dropping(store), log)
    assert summary.quarantined == summary.points > 0
    assert billed(dsn) == {}
    assert fetch(dsn, "SELECT DISTINCT reason FROM usage_quarantine") == [("not_storable",)]


async def test_a_file_of_another_time_is_refused_before_anything_is_read(
    store: Store, dsn: str, tmp_path: Path
) -> None:
    file = tmp_path / "old.log"
    file.write_text(line(-500 * 86_400) + line())
    with pytest.raises(UserError, match=r"line 1 of .*old.log: its time 2025-04-19.* is older .* --oldest"):
        await import_(store, file)
    assert fetch(dsn, "SELECT count(*) FROM usage_import_source") == [(0,)]
    assert not (tmp_path / "old.log.rejects").exists()
    assert (await import_(store, file, oldest=DAY - timedelta(days=501))).accepted == 2


# Rejects


async def test_rejects_are_mended_and_billed_once(store: Store, dsn: str, log: Path) -> None:
    log.write_text("".join([*LINES[:10], "garbage\n", *LINES[10:], "garbage\n", line(5, size="x")]))
    summary = await import_(store, log, piece_lines=7)
    assert (summary.accepted, summary.rejected) == (500, 3)
    rejects = log.with_name("access.log.rejects")
    records = [json.loads(each) for each in rejects.read_text().splitlines()]
    assert [(each["line"], each["text"]) for each in records[:2]] == [(11, "garbage"), (502, "garbage")]
    assert records[2]["reason"].startswith("expected the size in bytes")
    assert len({each["id"] for each in records}) == 3
    before = rejects.read_bytes()
    assert (await import_(store, log)).rejected == 0
    assert rejects.read_bytes() == before

    records[0]["text"] = LINES[0].rstrip("\n")
    records[1]["text"] = line(900, "globex").rstrip("\n")
    rejects.write_text("".join(json.dumps(each) + "\n" for each in records))
    mended = await import_(store, rejects, of_rejects=True)
    assert (mended.accepted, mended.rejected) == (2, 1)
    expected = sums([*LINES, LINES[0], line(900, "globex")])
    assert billed(dsn) == expected
    again = rejects.with_name("access.log.rejects.rejects")
    last = json.loads(again.read_text())
    assert last["id"] == records[2]["id"]

    last["text"] = line(901).rstrip("\n")
    again.write_text("".join(json.dumps(each) + "\n" for each in [*records[:2], last]))
    end = await import_(store, again, of_rejects=True)
    assert (end.accepted, end.duplicates, end.rejected) == (1, 2, 0)
    assert billed(dsn) == sums([*LINES, LINES[0], line(900, "globex"), line(901)])


async def test_a_reject_that_is_mended_in_two_ways_is_a_contradiction(store: Store, dsn: str, log: Path) -> None:
    log.write_text("garbage\n")
    await import_(store, log)
    rejects = log.with_name("access.log.rejects")
    record = json.loads(rejects.read_text())
    for size in (10, 11):
        rejects.write_text(json.dumps(record | {"text": line(size=size).rstrip("\n")}) + "\n")
        summary = await import_(store, rejects, of_rejects=True)
    assert (summary.accepted, summary.conflicts) == (0, 1)
    assert billed(dsn) == {("acme", "api.requests"): Decimal(1), ("acme", "egress"): Decimal(10)}


async def test_a_crash_between_rejects_and_commit_leaves_no_reject_twice(store: Store, dsn: str, log: Path) -> None:
    log.write_text("".join(["bad 1\n", *LINES[:5], "bad 2\n"]))
    broken = Failing(store)
    with pytest.raises(StoreUnavailable):
        await import_(broken, log)
    rejects = log.with_name("access.log.rejects")
    assert len(rejects.read_text().splitlines()) == 2
    with rejects.open("ab") as opened:
        opened.write(b'{"source": "web-1", "file": "acc')
    assert (await import_(store, log)).rejected == 2
    assert [json.loads(each)["text"] for each in rejects.read_text().splitlines()] == ["bad 1", "bad 2"]
    assert billed(dsn) == sums(LINES[:5])


class Failing:
    """A store whose writes never arrive."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def write(self, *_: object) -> None:
        raise StoreUnavailable("it is away")


async def test_a_file_that_is_no_reject_file_is_not_touched(store: Store, log: Path) -> None:
    rejects = log.with_name("access.log.rejects")
    for content in (b"my notes\n", b"my notes", b'{"a": 1}\n'):
        rejects.write_bytes(content)
        with pytest.raises(UserError, match="exists and is no reject file: move it away"):
            await import_(store, log)
        assert rejects.read_bytes() == content


async def test_rejects_of_another_source_are_not_mixed(store: Store, log: Path) -> None:
    log.write_text("garbage\n")
    await import_(store, log, source="one")
    with pytest.raises(UserError, match="holds rejects of the source 'one'"):
        await import_(store, log, source="two")
    rejects = log.with_name("access.log.rejects")
    shutil.move(rejects, log.with_name("moved"))
    summary = await import_(store, log.with_name("moved"), source="two", of_rejects=True)
    assert (summary.accepted, summary.rejected) == (0, 1)


# Several at once, and answers that get lost


@pytest.fixture
async def second(dsn: str) -> AsyncIterator[Store]:
    found = Store(dsn)
    await found.open()
    yield found
    await found.close()


async def test_two_imports_of_one_file_at_once(store: Store, second: Store, dsn: str, log: Path) -> None:
    both = await asyncio.gather(
        import_(store, log, piece_lines=20, rejects_file=log.with_name("r1")),
        import_(second, log, piece_lines=20, rejects_file=log.with_name("r2")),
    )
    assert sorted((each.accepted, each.before) for each in both) == [(0, 500), (500, 0)]
    assert billed(dsn) == sums(LINES)


async def test_one_that_has_lost_its_turn_writes_nothing(store: Store, dsn: str, log: Path) -> None:
    """What the lock should prevent: the file is further on than this importer believes."""
    await import_(store, log)
    [(file, source)] = fetch(dsn, "SELECT file, source FROM usage_import_file")
    with pytest.raises(StoreUnavailable, match="another import went on with"):
        async with store.transaction() as connection:
            await imports.advance(
                connection,
                source,
                file,
                "x",
                Progress(0, 0, b""),
                Progress(9, 1, b"other"),
                [],
                repeatable=True,  # type: ignore[arg-type]
            )
    assert fetch(dsn, "SELECT lines FROM usage_import_file") == [(500,)]


async def test_a_commit_whose_answer_is_lost_counts_once(store: Store, dsn: str, log: Path) -> None:
    class Doubling(Failing):
        async def write(self, batch: object, beside: object) -> object:  # type: ignore[override]
            await store.write(batch, beside)  # type: ignore[arg-type]
            return await store.write(batch, beside)  # type: ignore[arg-type]

    summary = await import_(Doubling(store), log, piece_lines=50)
    assert summary.accepted == 500
    assert billed(dsn) == sums(LINES)


async def test_what_is_beside_a_write_is_undone_with_it(store: Store, dsn: str, log: Path) -> None:
    class Breaking(Failing):
        async def write(self, batch: object, beside: object) -> object:  # type: ignore[override]
            async def broken(connection: object) -> None:
                await beside(connection)  # type: ignore[operator]
                raise StoreUnavailable("the line went dead")

            return await store.write(batch, broken)  # type: ignore[arg-type]

    with pytest.raises(StoreUnavailable):
        await import_(Breaking(store), log)
    for relation in ("usage_point", "usage_import_file", "usage_import_line", "usage_dirty"):
        assert fetch(dsn, f"SELECT count(*) FROM {relation}") == [(0,)]
    assert (await import_(store, log)).accepted == 500
    assert billed(dsn) == sums(LINES)


async def test_the_writers_role_can_import(store: Store, dsn: str, log: Path, tmp_path: Path) -> None:
    role = f"importing_{abs(hash(dsn)) % 10**8}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")  # type: ignore[arg-type]
    try:
        await store.grant(writer=role)
        with psycopg.connect(dsn, autocommit=True, options="-c search_path=tallymark") as connection:
            connection.execute(f"SET ROLE {role}")  # type: ignore[arg-type]
            for statement in ("SELECT * FROM usage_lines", "SELECT * FROM usage_import_line"):
                connection.execute(statement)  # type: ignore[arg-type]
        as_role = Store(psycopg.conninfo.make_conninfo(dsn, options=f"-c role={role}"))
        await as_role.open()
        try:
            assert (await import_(as_role, log)).accepted == 500
        finally:
            await as_role.close()
    finally:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")  # type: ignore[arg-type]
            connection.execute(f"DROP ROLE {role}")  # type: ignore[arg-type]
    assert billed(dsn) == sums(LINES)


async def test_a_limit_on_pieces_changes_no_number(store: Store, dsn: str, log: Path) -> None:
    for pieces in (1, 499, 500, 501):
        await import_(store, log, source=f"by {pieces}", piece_lines=pieces, again=True)
    assert billed(dsn) == {key: 4 * value for key, value in sums(LINES).items()}
