"""Mappings that follow one another, and files under a second source: what may grow, and that no line bills twice."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from tallymark_collector.errors import StoreUnavailable, UserError
from tallymark_collector.imports.mapping import Mapping, parse_mapping
from tallymark_collector.store import Store
from tests.support.logs import DAY, EVENT_MAPPING, LOG, billed, fetch, import_, line

KEYS = {"k1": "acme"}


def by_key(routes: str = "", otherwise: str = "", **lookup: str) -> Mapping:
    """Lines are billed to what a table makes of their user."""
    account = {"field": "user", "lookup": lookup} | ({"otherwise": otherwise} if otherwise else {})
    return parse_mapping(
        f"format: combined\naccount: {json.dumps(account)}\nmeters: [{{meter: api.requests}}]\n{routes}"
    )


def event(id_: str, customer: str) -> str:
    return json.dumps({"id": id_, "at": DAY.isoformat(), "customer": customer, "tokens": 1}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "access.log"
    file.write_text(line(0, "k1") + line(1, "k2") + line(2, "k1"))
    return file


def requests(**expected: int) -> dict[tuple[str, str], Decimal]:
    return {(account, "api.requests"): Decimal(count) for account, count in expected.items()}


async def test_a_new_customer_is_billed_from_the_grown_file_and_the_rejects(store: Store, dsn: str, log: Path) -> None:
    first = await import_(store, log, mapping=by_key(k1="acme"))
    assert (first.accepted, first.rejected) == (2, 1)
    with log.open("a") as opened:
        opened.write(line(3, "k2") + line(4, "k1"))
    grown = by_key(k1="acme", k2="globex")
    second = await import_(store, log, mapping=grown)
    assert (second.before, second.accepted, second.rejected) == (3, 2, 0)
    rejects = log.with_name("access.log.rejects")
    for accepted in (1, 0):
        assert (await import_(store, rejects, mapping=grown, of_rejects=True)).accepted == accepted
    assert billed(dsn) == requests(acme=3, globex=2)


async def test_additions_are_accepted_for_the_rejects_first(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log, mapping=by_key(k1="acme"))
    grown = by_key(k1="acme", k2="globex")
    rejects = log.with_name("access.log.rejects")
    assert (await import_(store, rejects, mapping=grown, of_rejects=True)).accepted == 1
    assert (await import_(store, log, mapping=grown)).before == 3
    assert billed(dsn) == requests(acme=2, globex=1)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (by_key(k1="other"), "account.lookup differ: 'k1' was 'acme' and is 'other'"),
        (by_key(k1="other", k2="globex"), "account.lookup differ: 'k1' was 'acme' and is 'other'"),
        (by_key(k2="globex"), "account.lookup differ: 'k1' was 'acme' and is left out"),
        (by_key(k1="acme", otherwise="public"), "account differ"),
        (by_key("unmatched_route: other\n", k1="acme"), "unmatched_route differ"),
        (LOG, "account, meters differ"),
    ],
)
async def test_what_changed_is_refused(store: Store, dsn: str, log: Path, mapping: Mapping, said: str) -> None:
    await import_(store, log, mapping=by_key(k1="acme"))
    with pytest.raises(UserError, match=f"the source 'web-1' was imported with another mapping: {said}"):
        await import_(store, log, mapping=mapping)
    assert billed(dsn) == requests(acme=2)


async def test_what_was_added_is_kept_like_the_rest(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log, mapping=by_key(k1="acme"))
    with log.open("a") as opened:
        opened.write(line(3, "k2"))
    await import_(store, log, mapping=by_key(k1="acme", k2="globex"))
    for mapping, said in [(by_key(k1="acme", k2="initech"), "is 'initech'"), (by_key(k1="acme"), "is left out")]:
        with pytest.raises(UserError, match=f"account.lookup differ: 'k2' was 'globex' and {said}"):
            await import_(store, log, mapping=mapping)
    assert billed(dsn) == requests(acme=2, globex=1)


async def test_additions_of_an_import_that_wrote_nothing_are_not_kept(store: Store, log: Path) -> None:
    await import_(store, log, mapping=by_key(k1="acme"))
    with log.open("a") as opened:
        opened.write(line(3, "k2"))
    rejects = log.with_name("access.log.rejects")
    kept = rejects.read_text()
    rejects.write_text("my notes\n")
    with pytest.raises(UserError, match="is no reject file"):
        await import_(store, log, mapping=by_key(k1="acme", k2="globx"))
    rejects.write_text(kept)
    assert (await import_(store, log, mapping=by_key(k1="acme", k2="globex"))).accepted == 1


ROUTES = ('routes: ["/a/{id}"]\n', 'routes: ["/a/b", "/a/{id}", "/c"]\n', 'routes: ["/a/{id}", "/a/b"]\n')


async def test_routes_may_be_added(store: Store, dsn: str, log: Path) -> None:
    log.write_text(line(0, "k1", "/a/b"))
    for number, routes in enumerate(("", *ROUTES[:2])):
        summary = await import_(store, log, mapping=by_key(routes, **KEYS))
        assert (summary.before, summary.accepted) == (number, 1)
        with log.open("a") as opened:
            opened.write(line(number + 1, "k1", "/a/b"))
    rows = fetch(dsn, "SELECT route FROM usage_hourly ORDER BY route NULLS FIRST")
    assert [route for (route,) in rows] == [None, "/a/b", "/a/{id}"]
    for routes in (ROUTES[0], ROUTES[2], 'routes: [{match: "/a/b", route: x}, "/a/{id}", "/c"]\n'):
        with pytest.raises(UserError, match=r"another mapping: routes differ. .* may be added, none changed"):
            await import_(store, log, mapping=by_key(routes, **KEYS))


async def test_lines_that_were_billed_stay_as_they_were(store: Store, dsn: str, log: Path) -> None:
    """In a file that nobody knows: what the tables say of them by now makes no contradiction of it."""
    await import_(store, log, mapping=by_key(otherwise="public", k1="acme"))
    grown = by_key('routes: ["/orders"]\n', otherwise="public", k1="acme", k2="globex")
    log.write_text(line(9, "k2") + log.read_text())
    summary = await import_(store, log, mapping=grown)
    assert (summary.accepted, summary.duplicates, summary.conflicts) == (1, 3, 0)
    assert billed(dsn) == requests(acme=2, public=1, globex=1)


@pytest.mark.parametrize("times", [1, 2])
async def test_ids_that_an_earlier_mapping_billed_are_no_contradiction(
    store: Store, dsn: str, tmp_path: Path, times: int
) -> None:
    def events(**lookup: str) -> Mapping:
        account = json.dumps({"field": "customer", "lookup": lookup, "otherwise": "public"})
        return parse_mapping(EVENT_MAPPING.replace("account: customer", f"account: {account}"))

    file = tmp_path / "events.jsonl"
    file.write_text(event("1", "k1") + event("2", "k2"))
    await import_(store, file, mapping=events(k1="acme"))
    for number in range(times):
        file.write_text(event(f"new {number}", "k2") + event("1", "k1") + event("2", "k2"))
        summary = await import_(
            store, file, mapping=events(k1="acme", k2="globex", **dict.fromkeys("xy"[:number], "z"))
        )
        assert (summary.accepted, summary.duplicates, summary.conflicts) == (1, 2, 0)
    file.write_text(event("2", "k1"))
    contradicting = await import_(
        store, file, mapping=events(k1="acme", k2="globex", **dict.fromkeys("xy"[:number], "z"))
    )
    assert (contradicting.duplicates, contradicting.conflicts) == (0, 1)
    assert billed(dsn) == {
        ("acme", "llm.tokens"): Decimal(1),
        ("public", "llm.tokens"): Decimal(1),
        ("globex", "llm.tokens"): Decimal(times),
    }


async def test_a_mapping_that_has_billed_nothing_is_forgotten(store: Store, dsn: str, log: Path) -> None:
    wrong = by_key(nobody="acme")
    assert (await import_(store, log, mapping=wrong, piece_lines=1)).rejected == 3
    again = await import_(store, log, mapping=wrong)
    assert (again.before, again.rejected) == (3, 0), "with the same one the file goes on"
    summary = await import_(store, log, mapping=by_key(k1="acme"))
    assert (summary.before, summary.accepted, summary.rejected) == (0, 2, 1), "read from its start"
    assert (await import_(store, log, mapping=by_key(k1="acme"))).before == 3
    with pytest.raises(UserError, match="another mapping"):
        await import_(store, log, mapping=wrong)
    rejects = log.with_name("access.log.rejects")
    mended = await import_(store, rejects, mapping=by_key(k1="acme"), of_rejects=True)
    assert (mended.duplicates, mended.rejected) == (2, 1), "what the reject file still has of it is billed once"
    assert billed(dsn) == requests(acme=2)


async def test_a_file_that_was_forgotten_is_not_read_on(store: Store, dsn: str, log: Path) -> None:
    """Killed in the midst of being read again, it goes on there, and not where the forgotten one had been."""

    class Dying:
        def __init__(self) -> None:
            self.writes = 0

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def write(self, batch: object, beside: object) -> object:
            self.writes += 1
            if self.writes > 1:
                raise StoreUnavailable("it is away")
            return await store.write(batch, beside)  # type: ignore[arg-type]

    await import_(store, log, mapping=by_key(nobody="acme"))
    with pytest.raises(StoreUnavailable):
        await import_(Dying(), log, mapping=by_key(k1="acme"), piece_lines=1)
    rest = await import_(store, log, mapping=by_key(k1="acme"))
    assert (rest.before, rest.accepted) == (1, 1)
    assert billed(dsn) == requests(acme=2)


async def test_nothing_is_kept_of_an_import_that_fails_on_its_reject_file(store: Store, dsn: str, log: Path) -> None:
    rejects = log.with_name("access.log.rejects")
    rejects.write_text("my notes\n")
    with pytest.raises(UserError, match="is no reject file"):
        await import_(store, log, mapping=by_key(k1="other"))
    assert fetch(dsn, "SELECT count(*) FROM usage_import_source") == [(0,)]
    rejects.unlink()
    assert (await import_(store, log, mapping=by_key(k1="acme"))).accepted == 2


# The same file under another source


async def test_a_file_that_another_source_has_billed_is_refused(store: Store, dsn: str, log: Path) -> None:
    await import_(store, log)
    with log.open("a") as opened:
        opened.write(line(5))
    with pytest.raises(UserError, match=r"begins with the 3 lines of .*access.log that the source 'web-1' has") as told:
        await import_(store, log, source="web1")
    assert "--source web-1" in str(told.value)
    assert "--again" in str(told.value)
    assert fetch(dsn, "SELECT count(*) FROM usage_import_source") == [(1,)]
    assert (await import_(store, log)).accepted == 1
    meant = await import_(store, log, source="web1", again=True)
    assert meant.accepted == 4
    with log.open("a") as opened:
        opened.write(line(6))
    assert (await import_(store, log, source="web1")).accepted == 1, "it is a file of that source, too, by now"


async def test_another_source_that_billed_nothing_has_no_claim(store: Store, log: Path) -> None:
    assert (await import_(store, log, mapping=by_key(nobody="acme"))).rejected == 3
    log.with_name("access.log.rejects").unlink()
    assert (await import_(store, log, source="web-2")).accepted == 3


async def test_a_header_is_no_beginning(store: Store, dsn: str, tmp_path: Path) -> None:
    mapping = parse_mapping("format: csv\ntime: at\naccount: customer\nmeters: [{meter: calls}]\n")
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("at,customer\n")
    await import_(store, one, mapping=mapping)
    first = tmp_path / "first.csv"
    first.write_text(f"at,customer\n{DAY.isoformat()},globex\n")
    await import_(store, first, mapping=mapping)
    two.write_text(f"at,customer\n{DAY.isoformat()},acme\n")
    assert (await import_(store, two, mapping=mapping, source="web-2")).accepted == 1


async def test_another_tenants_source_has_no_claim(store: Store, dsn: str, log: Path) -> None:
    with psycopg.connect(dsn, options="-c search_path=tallymark") as connection:
        connection.execute("INSERT INTO tenant (tenant) VALUES ('other')")
    await import_(store, log)
    assert (await import_(store, log, tenant="other", source="web-2", rejects_file=log.with_name("r"))).accepted == 3


async def test_rejects_of_another_source_are_told_line_by_line(store: Store, log: Path) -> None:
    log.write_text(line() + "garbage\n")
    await import_(store, log, source="one")
    rejects = log.with_name("access.log.rejects")
    assert (await import_(store, rejects, source="two", of_rejects=True)).rejected == 1
