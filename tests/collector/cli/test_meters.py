"""`tallymark meters` on captured telemetry, and `--meters` beside plans and code."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.errors import UserError
from tallymark_collector.metering.captured import read_captured
from tests.collector.cli.conftest import Run, cells, program
from tests.support.messages import otlp_json
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, request, sum_metric

RULES = """\
meters:
  gateway.requests:
    unit: "{request}"
    sources:
      - metric: http.server.request.duration
        scope: kong
        quantity: count
        account: consumer
        dimensions: [http.route]
      - span: "*"
        kind: server
        where: {http.response.status_code: {to: 499}}
        account: consumer
        spans_are_complete: true
  never:
    unit: By
    sources: [{metric: nothing, quantity: value, account: consumer}]
"""
KONG = {"service.name": "kong", "service.instance.id": "one"}


def total(end: int, count: int, consumer: str | None = "acme") -> Any:
    attributes = {} if consumer is None else {"consumer": consumer}
    return histogram_point(BASE, BASE + end * SECOND, count, None, attributes)


CAPTURED: list[Message] = [
    metrics_of(KONG, histogram([total(10, 5), total(20, 9)], temporality=2), scope="kong"),
    metrics_of(KONG, histogram([total(20, 9)], temporality=2), scope="kong"),
    metrics_of(KONG, histogram([total(10, 5)]), scope="other"),
    spans_of(KONG, [span(n, {"consumer": "globex", "http.response.status_code": 200 + 100 * n}) for n in range(4)]),
    spans_of(KONG, [span(1, {"consumer": "globex", "http.response.status_code": 300})]),
    request(sum_metric([number(BASE, BASE + SECOND, 3, {"tallymark.account.id": "acme"})])),
]
UNNAMED = metrics_of(KONG, histogram([total(10, 2, None)]), scope="kong")


def written(folder: Path, way: str, *messages: Message) -> Path:
    file = folder / f"captured.{way}"
    bodies = [message.SerializeToString() for message in messages]
    match way:
        case "json":
            file.write_bytes(b"\n".join(map(otlp_json, messages)) + b"\n")
        case "fixed":
            file.write_bytes(b"".join(len(body).to_bytes(4, "big") + body for body in bodies))
        case "varint":
            file.write_bytes(b"".join(varint(len(body)) + body for body in bodies))
    return file


def varint(number_: int) -> bytes:
    out = bytearray()
    while number_ > 127:
        out.append(number_ & 127 | 128)
        number_ >>= 7
    return bytes([*out, number_])


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "meters.yaml"
    file.write_text(RULES)
    return file


@pytest.mark.parametrize("way", ["json", "fixed", "varint"])
def test_what_a_captured_file_would_bill(offline: Run, rules: Path, tmp_path: Path, way: str) -> None:
    file = written(tmp_path, way, *CAPTURED)
    result = offline("meters", "check", str(rules), str(file), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    usage = {(line["meter"], line["account"]): Decimal(line["quantity"]) for line in found["usage"]}
    assert usage == {
        ("api.requests", "acme"): 3,
        ("gateway.requests", "acme"): 9,  # the total, not 5 + 9 + 9
        ("gateway.requests", "globex"): 3,  # of four spans, one failed; one came twice
    }
    assert (found["duplicates"], found["quarantined"]) == (2, 0)
    why = {item["name"]: item["why"] for item in found["items"] if item["outcome"] == "passed over"}
    assert why == {
        "http.server.request.duration": "gateway.requests, source 1: its scope is 'other'",
        "ingress": "gateway.requests, source 2: http.response.status_code is 500, not {to: 499}",
    }


def test_the_table_says_the_same_and_quarantine_is_status_1(offline: Run, rules: Path, tmp_path: Path) -> None:
    good, bad = written(tmp_path, "json", *CAPTURED), written(tmp_path, "fixed", UNNAMED)
    result = offline("meters", "check", str(rules), str(good), str(bad))
    assert result.exit_code == 1
    table = cells(result.stdout)
    assert ["gateway.requests", "{request}", "acme", "9", "2"] in table
    [refused] = [row for row in table if row[0] == "quarantined"]
    assert refused[1:4] == ["metrics", "http.server.request.duration", "1"]
    assert "account_missing" in refused[4]
    assert "looked at consumer" in refused[4]
    assert "meter never: nothing here fits any of its sources" in result.stdout
    assert "quarantined 1" in result.stdout


def test_where_running_totals_begin_to_count_is_told(offline: Run, rules: Path, tmp_path: Path) -> None:
    file = written(tmp_path, "json", CAPTURED[0])
    result = offline("meters", "check", str(rules), str(file))
    said = (
        "meter gateway.requests: 1 running totals are billed whole, 5, all since 2026-09-21T14:00:00Z; where that was"
    )
    assert said in result.stdout
    found = json.loads(offline("meters", "check", str(rules), str(file), "--json").stdout)
    assert found["whole"] == [
        {"meter": "gateway.requests", "streams": 1, "quantity": "5", "oldest": "2026-09-21T14:00:00Z"}
    ]
    # Began before `since`, with a total from before it, and without one.
    for second, quantity, why in ((10, "4", "it is from before"), (5, "4", "the first total that is seen of a stream")):
        rules.write_text(
            RULES.replace("quantity: count", f"quantity: count\n        since: 2026-09-21T14:00:{second:02}Z")
        )
        result = offline("meters", "check", str(rules), str(file))
        table = cells(result.stdout)
        assert ["gateway.requests", "{request}", "acme", quantity, "1"] in table
        [base] = [row for row in table if row[0] == "base"]
        assert base[1:4] == ["metrics", "http.server.request.duration", "1"]
        assert why in base[4]
        assert "billed whole" not in result.stdout
        assert "counted 1" in result.stdout
        assert "base 1" in result.stdout


@pytest.mark.parametrize("start", [0, BASE + 10 * SECOND])
def test_a_total_without_a_start_is_a_base(offline: Run, rules: Path, tmp_path: Path, start: int) -> None:
    points = [
        histogram_point(start, BASE + end * SECOND, count, None, {"consumer": "acme"})
        for end, count in ((10, 5), (20, 9))
    ]
    file = written(tmp_path, "json", metrics_of(KONG, histogram(points, temporality=2), scope="kong"))
    found = json.loads(offline("meters", "check", str(rules), str(file), "--json").stdout)
    assert [(line["account"], line["quantity"]) for line in found["usage"]] == [("acme", "4")]
    outcomes = {item["quantity"]: (item["outcome"], item["why"][:15]) for item in found["items"]}
    assert outcomes == {"5": ("base", "the first total"), "9": ("counted", "total, its incr")}
    assert found["whole"] == []


def test_stdin_and_one_request_alone(rules: Path, tmp_path: Path, offline: Run) -> None:
    text = otlp_json(CAPTURED[0])
    found = program("meters", "check", str(rules), "-", "--json", input=text.decode())
    assert json.loads(found.stdout)["usage"][0]["quantity"] == "9"
    for content in (CAPTURED[0].SerializeToString(), json.dumps(json.loads(text), indent=2).encode()):
        file = tmp_path / "one"
        file.write_bytes(content)
        result = offline("meters", "check", str(rules), str(file), "--json")
        assert json.loads(result.stdout)["usage"][0]["quantity"] == "9"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello", "is neither OTLP as JSON"),
        (b'{"resourceMetrics": []}\n{"a": 1}\n', ":2 has none of resourceMetrics"),
        (b'{"resourceMetrics": []}\n{"resourceSpans": 7}\n', ":2: not an OTLP ExportTraceServiceRequest"),
        (b"\x28\xb5\x2f\xfd...", "is compressed"),
    ],
)
def test_what_cannot_be_read(offline: Run, rules: Path, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "captured"
    file.write_bytes(content)
    result = offline("meters", "check", str(rules), str(file))
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_wrong_file_is_told_whole(offline: Run, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("meters:\n  a: {unit: s}\n  b: {units: s, sources: []}\n")
    for command in (["meters", "list", str(file)], ["serve", "--meters", str(file)], ["check", "--meters", str(file)]):
        result = offline(*command)
        assert result.exit_code == 1
        for said in (
            "m.yaml:2: meters.a.sources: is required",
            "m.yaml:3: meters.b.units: unknown field",
        ):
            assert said in result.stderr
    missing = offline("meters", "list", str(tmp_path / "nowhere"))
    assert missing.exit_code == 2
    assert "cannot be read" in missing.stderr


def test_list(offline: Run, rules: Path) -> None:
    table = cells(offline("meters", "list", str(rules)).stdout)
    assert table[1] == [
        "gateway.requests",
        "{request}",
        "sum",
        "metric http.server.request.duration",
        "count",
        "scope kong",
        "consumer",
        "http.route",
    ]
    found = json.loads(offline("meters", "list", str(rules), "--json").stdout)
    assert found["meters"]["never"]["unit"] == "By"


def test_plans_and_code_know_the_meters_of_the_file(offline: Run, run: Run, rules: Path, tmp_path: Path) -> None:
    plans = tmp_path / "plans.yaml"
    plans.write_text(
        """\
currency: EUR
meters:
  gateway.requests: {unit: "1"}
plans:
  pro: {charges: [{meter: gateway.requests, unit_price: 1, name: Requests}]}
"""
    )
    unit = "meter 'gateway.requests' has the unit '{request}' here and '1' in"
    unknown = "meter 'never' is not in"
    for command in (["plans", "check"], ["plans", "apply"]):
        assert offline(*command[:1], "check", str(plans)).exit_code == 0
        result = run(*command, str(plans), "--meters", str(rules))
        assert result.exit_code == 1
        assert f"{rules}:2: {unit}" in result.output
        assert f"{rules}:15: {unknown}" in result.output
    code = tmp_path / "src"
    code.mkdir()
    (code / "a.py").write_text("import tallymark\n")
    result = offline("check", str(code), "--plans", str(plans), "--meters", str(rules))
    assert result.exit_code == 1
    assert unit in result.stdout
    assert "nothing records it" not in result.stdout
    assert "nothing records it" in offline("check", str(code), "--plans", str(plans)).stdout


def levels(*points: tuple[int, float, dict[str, object]], metric: str = "seats") -> Message:
    found = Metric(name=metric, unit="{seat}")
    found.gauge.data_points.extend(number(0, BASE + at * SECOND, value, attributes) for at, value, attributes in points)
    return metrics_of(KONG, found)


def test_levels_are_explained_and_are_no_usage(offline: Run, tmp_path: Path) -> None:
    one, two = {"consumer": "acme", "pod": "one"}, {"consumer": "acme", "pod": "two"}
    falling = sum_metric(
        [number(BASE, BASE + 30 * SECOND, 4.5, {"consumer": "globex"})],
        "seats",
        "{seat}",
        temporality=2,
        monotonic=False,
    )
    file = written(
        tmp_path,
        "json",
        levels((10, 3, one), (20, 7, one), (10, 40, two), (15, 2, {"tallymark.account.id": "own"})),
        levels((20, 7, one)),
        metrics_of(KONG, falling),
        levels((10, 5, {"tallymark.account.id": "initech"}), metric="queue"),
    )
    meters = tmp_path / "meters.yaml"
    meters.write_text(LEVELS)
    result = offline("meters", "check", str(meters), str(file))
    assert result.exit_code == 1
    table = cells(result.stdout)
    assert ["seats", "{seat}", "acme", "47", "2", "3"] in table
    assert ["seats", "{seat}", "globex", "4.5", "1", "1"] in table
    assert ["queue", "{seat}", "initech", "5", "1", "1"] in table
    assert "counted 0, levels 5, duplicates 1, quarantined 1, passed over 0" in result.stdout
    found = json.loads(offline("meters", "check", str(meters), str(file), "--json").stdout)
    assert found["usage"] == []
    assert {"meter": "seats", "unit": "{seat}", "account": "acme", "level": "47", "streams": 2, "points": 3} in found[
        "levels"
    ]
    told = [(item["account"], item["quantity"], item["outcome"]) for item in found["items"]]
    assert sorted(told, key=str) == sorted(
        [
            ("acme", "3", "level"),
            ("acme", "7", "level"),
            ("acme", "40", "level"),
            ("globex", "4.5", "level"),
            ("initech", "5", "level"),
            ("", None, "quarantined"),
        ],
        key=str,
    )


def test_why_a_point_is_no_level_and_a_level_no_amount(offline: Run, tmp_path: Path) -> None:
    meters = tmp_path / "meters.yaml"
    meters.write_text(
        """\
meters:
  seats: {unit: "{seat}", aggregation: level, sources: [{metric: seats, quantity: value, account: consumer}]}
  others: {unit: "{seat}", aggregation: level, sources: [{metric: "s*", quantity: value, account: consumer}]}
  sold: {unit: "{seat}", sources: [{metric: "q*", quantity: value, account: consumer}]}
"""
    )
    who: dict[str, object] = {"consumer": "acme"}
    counter = sum_metric([number(BASE, BASE + SECOND, 4, who)], "seats", "{seat}", temporality=2)
    changes = sum_metric([number(BASE, BASE + SECOND, 4, who)], "seats", "{seat}", temporality=1, monotonic=False)
    twice = levels((1, 3, who)), levels((1, 4, who))
    file = written(
        tmp_path, "fixed", metrics_of(KONG, counter), metrics_of(KONG, changes), levels((1, 3, who), metric="q"), *twice
    )
    found = json.loads(offline("meters", "check", str(meters), str(file), "--json").stdout)
    why = [(item["outcome"], item["meter"], item["why"]) for item in found["items"]]
    for outcome, meter, said in (
        ("quarantined", "seats", "type_unsupported: meter seats: it is a counter: what it has added up is no level"),
        ("quarantined", "seats", "type_unsupported: meter seats: a sum that can fall (UpDownCounter) came as changes"),
        ("quarantined", "others", "type_unsupported: meter others: a sum that can fall"),
        ("passed over", "", "sold, source 1: it is a gauge: what it stands at is no amount; say `aggregation: level`"),
        ("level", "seats", "what its stream stands at from then on"),
        ("quarantined", "seats", "value_conflict: its stream stood at 3 at this time before"),
    ):
        assert any(one[:2] == (outcome, meter) and one[2].startswith(said) for one in why), (said, why)


LEVELS = """\
meters:
  seats: {unit: "{seat}", aggregation: level, sources: [{metric: seats, quantity: value, account: consumer}]}
  calls: {unit: "{request}", sources: [{metric: h, quantity: count, account: consumer}]}
  traced: {unit: "{request}", sources: [{span: "*", account: consumer, spans_are_complete: true}]}
"""
PLANS = """\
currency: EUR
meters:
  seats: {{unit: "{{seat}}", aggregation: {seats}}}
  calls: {{unit: "{{request}}", aggregation: {calls}}}
  traced: {{unit: "{{request}}", aggregation: {traced}}}
plans:
  pro: {{charges: [{{meter: seats, unit_price: 1}}, {{meter: calls, unit_price: 1}}, {{meter: traced, unit_price: 1}}]}}
"""


@pytest.mark.parametrize(
    ("seats", "calls", "traced", "wrong"),
    [
        ("integral", "sum", "count", {}),
        ("max", "'unique, of: x'", "max", {}),
        ("average", "sum", "latest", {}),
        ("latest", "sum", "sum", {}),
        ("sum", "sum", "sum", {2: "'seats' is made of levels, and billed by its sum"}),
        ("count", "average", "integral", {2: "levels, and billed by its count", 3: "its average", 4: "its integral"}),
        ("'unique, of: x'", "sum", "sum", {2: "made of levels, and billed by its unique"}),
    ],
)
def test_plans_bill_levels_by_what_levels_have_and_increases_by_what_they_have(
    offline: Run, tmp_path: Path, seats: str, calls: str, traced: str, wrong: dict[int, str]
) -> None:
    meters, plans, code = tmp_path / "meters.yaml", tmp_path / "plans.yaml", tmp_path / "a.py"
    meters.write_text(LEVELS)
    code.write_text("import tallymark\n")
    plans.write_text(PLANS.format(seats=seats.strip("'"), calls=calls.strip("'"), traced=traced.strip("'")))
    for command in (["plans", "check", str(plans)], ["check", str(code), "--plans", str(plans)]):
        result = offline(*command, "--meters", str(meters))
        assert result.exit_code == bool(wrong), result.output
        told = [line for line in result.output.splitlines() if line.startswith(f"{meters}:")]
        assert len(told) == len(wrong)
        for line, (number_, said) in zip(told, wrong.items(), strict=True):
            assert line.startswith(f"{meters}:{number_}: ")
            assert said in line


def test_what_is_whole_of_a_file_that_is_still_being_written(offline: Run, rules: Path, tmp_path: Path) -> None:
    """Wherever the writer is in its last line, also within a character."""
    file = written(tmp_path, "json", *CAPTURED[:2], metrics_of({"ort": "Köln"}, histogram([total(10, 5)])))
    data = file.read_bytes().replace(b"K\\u00f6ln", "Köln".encode())
    first = data.index(b"\n", data.index(b"\n") + 1) + 1
    expected = read_captured(data[:first], "x")
    assert (len(expected.requests), expected.torn) == (2, None)
    for end in range(first + 1, len(data) - 1):
        found = read_captured(data[:end], "x")
        assert (found.requests, found.torn is not None and found.torn.startswith("x:3: ")) == (expected.requests, True)
    for end in (len(data) - 1, len(data)):
        assert (len(read_captured(data[:end], "x").requests), read_captured(data[:end], "x").torn) == (3, None)

    file.write_bytes(data[: data.index("ö".encode()) + 1])
    result = offline("meters", "check", str(rules), str(file))
    assert result.exit_code == 0, result.output
    assert ["gateway.requests", "{request}", "acme", "9", "2"] in cells(result.stdout)
    assert f"{file}:3: the last line is not whole and is left out" in result.output
    found = json.loads(offline("meters", "check", str(rules), str(file), "--json").stdout)
    assert [one.split(": ")[0] for one in found["torn"]] == [f"{file}:3"]
    assert [line["quantity"] for line in found["usage"]] == ["9"]


@pytest.mark.parametrize(
    ("text", "place"),
    [('{"resourceMetrics": [', "x:1"), ('{"resourceMetrics": []}\n{"resourceM\n{"resourceMetrics": []}', "x:2")],
    ids=["there is nothing else", "not the last line"],
)
def test_a_line_that_nobody_is_still_writing_is_refused(text: str, place: str) -> None:
    with pytest.raises(UserError, match=f"^{place}: not JSON"):
        read_captured(text.encode(), "x")
    with pytest.raises(UserError, match=r"^x:2: not JSON"):
        read_captured(b'{"resourceMetrics": []}\n{"resourceM\n', "x")


def test_reading_is_not_confused_by_the_order_of_signals() -> None:
    """Metrics and spans are told apart by what they hold, also when one parses as the other."""
    for message, signal in ((CAPTURED[0], "metrics"), (CAPTURED[3], "traces")):
        [one] = read_captured(message.SerializeToString(), "x").requests
        assert (one.signal, one.request) == (signal, message)
    assert read_captured(b" \n", "x").requests == []
