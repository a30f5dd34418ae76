"""Real files, as published, are billed to the request, the byte and the token.

What is expected is counted here with a line of awk or Python's csv module, not by anything of Tallymark's.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path

import pytest

from tallymark_collector.imports.importer import Request, Watching, run
from tallymark_collector.imports.mapping import parse_mapping
from tallymark_collector.store import Store
from tests.support.logs import DAY, billed, fetch

DATA = Path(__file__).parents[3] / "shared" / "data"
LOG, CALLS = DATA / "http_access.log", DATA / "llm_requests.csv"
OLDEST = DAY.replace(year=2015, month=1)

pytestmark = [
    pytest.mark.skipif(
        not (LOG.exists() and CALLS.exists()),
        reason=f"NOT TESTED on real input: no {LOG.name} or {CALLS.name} in {DATA}",
    ),
    pytest.mark.engines("embedded", "timescale"),
]

OF_LOG = parse_mapping("""\
format: combined
account: host
meters:
  - {meter: api.requests, unit: "{request}"}
  - {meter: egress, unit: By, field: bytes}
routes: ["/blog/tags/{tag}", "/images/**", {match: "/presentations/**", route: "/presentations/{file}"}]
unmatched_route: other
""")
OF_CALLS = parse_mapping("""\
format: csv
time: {field: TIMESTAMP, time_zone: UTC}
account: {value: code}
meters:
  - {meter: llm.tokens, unit: "{token}", field: ContextTokens, dimensions: {type: {value: input}}}
  - {meter: llm.tokens, unit: "{token}", field: GeneratedTokens, dimensions: {type: {value: output}}}
  - {meter: llm.requests, unit: "{request}"}
""")
AWK = """\
{ count[$1]++; if ($10 != "-") bytes[$1] += $10 }
END { for (each in count) printf "%s %d %.0f\\n", each, count[each], bytes[each] }"""


def by_awk() -> list[list[str]]:
    """Address, requests, bytes."""
    done = subprocess.run(["awk", AWK, LOG], capture_output=True, text=True, check=True)
    return [each.split() for each in done.stdout.splitlines()]


async def import_(store: Store, path: Path, name: str, mapping: object, **more: object) -> object:
    wanted = Request(name, mapping, oldest=OLDEST, **more)  # type: ignore[arg-type]
    return await run(store, wanted, [str(path)], Watching())


async def test_an_access_log(store: Store, dsn: str, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects"
    first = await import_(store, LOG, "site", OF_LOG, rejects_file=rejects)
    # One user agent never closes its quote: that line is set aside, mended, and imported again.
    [record] = [json.loads(each) for each in rejects.read_text().splitlines()]
    assert (record["line"], record["text"]) == (8899, LOG.read_text().splitlines()[8898])
    rejects.write_text(json.dumps(record | {"text": record["text"] + '"'}) + "\n")
    mended = await import_(store, rejects, "site", OF_LOG, of_rejects=True)
    assert (first.accepted, first.rejected, mended.accepted) == (9999, 1, 1)  # type: ignore[attr-defined]
    again = await import_(store, LOG, "site", OF_LOG, rejects_file=rejects)
    assert (again.accepted, again.before) == (0, 10_000)  # type: ignore[attr-defined]

    expected = {}
    for host, count, size in by_awk():
        expected[host, "api.requests"] = Decimal(count)
        expected[host, "egress"] = Decimal(size)
    assert len(expected) == 2 * 1753
    assert billed(dsn) == {key: value for key, value in expected.items() if value}

    columns = defaultdict(Counter)  # type: ignore[var-annotated]
    for text in LOG.read_text().splitlines():
        words = text.split('"')
        method, target, _ = words[1].split()
        columns["method"][method] += 1
        columns["status_code"][int(words[2].split()[0])] += 1
        columns["route"]["presentations" if target.startswith("/presentations/") else "…"] += 1
        columns["hour"][text.split("[")[1][:14]] += 1
    for column in ("method", "status_code"):
        rows = fetch(dsn, f"SELECT {column}, sum(quantity) FROM usage_hourly WHERE meter = 'api.requests' GROUP BY 1")
        assert dict(rows) == columns[column]  # type: ignore[arg-type]
    rows = fetch(
        dsn, "SELECT to_char(bucket, 'DD/Mon/YYYY:HH24'), sum(quantity) FROM usage_hourly WHERE unit <> 'By' GROUP BY 1"
    )
    assert dict(rows) == columns["hour"]  # type: ignore[arg-type]
    rows = fetch(dsn, "SELECT sum(quantity) FROM usage_hourly WHERE unit <> 'By' AND route = '/presentations/{file}'")
    assert rows == [(columns["route"]["presentations"],)]


async def test_the_calls_of_a_language_model(store: Store, dsn: str, tmp_path: Path) -> None:
    with CALLS.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    first = await import_(store, CALLS, "llm", OF_CALLS, rejects_file=tmp_path / "r")
    assert (first.accepted, first.left) == (len(rows) - 1, 1)  # type: ignore[attr-defined]
    rest = await import_(store, CALLS, "llm", OF_CALLS, rejects_file=tmp_path / "r", final=True)
    assert (rest.accepted, rest.left, rest.before) == (1, 0, len(rows))  # type: ignore[attr-defined]
    found = fetch(
        dsn,
        "SELECT meter, attributes ->> 'type', sum(quantity), sum(points) FROM usage_hourly GROUP BY 1, 2 ORDER BY 1, 2",
    )
    tokens = {name: [int(row[name]) for row in rows] for name in ("ContextTokens", "GeneratedTokens")}
    assert found == [
        ("llm.requests", None, len(rows), len(rows)),
        ("llm.tokens", "input", sum(tokens["ContextTokens"]), sum(map(bool, tokens["ContextTokens"]))),
        ("llm.tokens", "output", sum(tokens["GeneratedTokens"]), sum(map(bool, tokens["GeneratedTokens"]))),
    ]
    assert sum(tokens["ContextTokens"]) == 18_059_974
    numbers = fetch(dsn, "SELECT line, quantity FROM usage_lines WHERE attributes ->> 'type' = 'input' ORDER BY line")
    assert numbers == [(place, value) for place, value in enumerate(tokens["ContextTokens"], 2) if value]
