"""The mapping file: everything wrong is told at once with its line, and what a line bills by it."""

from __future__ import annotations

import json
from collections.abc import Mapping as MappingType
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from tallymark_collector.documents.problems import DocumentError
from tallymark_collector.imports import formats
from tallymark_collector.imports.extraction import Extraction, Line
from tallymark_collector.imports.faults import LineFault, LineSkipped, TooOld
from tallymark_collector.imports.mapping import Mapping, mapping_of, parse_mapping

NOON = datetime(2026, 9, 1, 12, tzinfo=timezone.utc)
NOON_NS = int(NOON.timestamp()) * 10**9
DAY_NS = 86_400 * 10**9
LOG_LINE = '10.0.0.1 - acme [01/Sep/2026:12:00:00 +0000] "{}" {} 512 "-" "curl"'


def problems(text: str) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        parse_mapping(text, "m.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_everything_wrong_is_told_at_once_with_its_line() -> None:
    found = problems("""\
format: combined
account: {field: usr, pattern: "("}
time: {format: clf, time_zone: Europe/Zurik}
meters:
  - {meter: api.requests, unit: "{request}", feild: bytes}
  - {meter: egress, field: bytes, quantity: 2}
  - {unit: By}
dimensions:
  tallymark.account.id: user
  region: {value: eu, field: host}
filters: [{field: status}]
routes: [orders, "/a/{b", "/**/x/**"]
unmatched_route: drop
delimiter: ";"
""")
    expected = [
        "m.yaml:2: account.field: an access log has no field 'usr'; did you mean user; it has",
        "m.yaml:2: account.pattern: is no regular expression",
        "m.yaml:3: time.field: is required",
        "m.yaml:3: time.time_zone: 'Europe/Zurik' is not an IANA time zone; did you mean Europe/Zurich?",
        "m.yaml:5: meters[0].feild: unknown field; did you mean field?",
        "m.yaml:6: meters[1]: has both `field` and `quantity`: keep one",
        "m.yaml:7: meters[2].meter: is required",
        'm.yaml:9: dimensions["tallymark.account.id"]: tallymark.account.id is set by `account`',
        "m.yaml:10: dimensions.region: needs either `field` or `value`",
        "m.yaml:11: filters[0]: needs either `keep` or `skip`",
        "m.yaml:12: routes[0].match: 'orders' must begin with /",
        "m.yaml:12: routes[1].match: '/a/{b' has a brace that is not part of {name}",
        "m.yaml:12: routes[2].match: '/**/x/**' may have ** once",
        "m.yaml:13: unmatched_route: expected one of none, other, path, got 'drop'",
        "m.yaml:14: delimiter: goes with the format csv alone",
    ]
    assert len(found) == len(expected), found
    for said, start in zip(found, expected, strict=True):
        assert said.startswith(start), (said, start)


def test_what_csv_and_json_cannot_do_without() -> None:
    assert problems("format: csv\naccount: a\n") == [
        "m.yaml:1: time: is required for the format csv, e.g. {field: timestamp, format: iso8601}",
        "m.yaml:1: meters: is required for the format csv, e.g. [{meter: api.requests}]",
    ]
    assert problems("") == [
        "m.yaml:1: is empty; a mapping needs `format` and `account`, and `time` and `meters` where it is csv or json"
    ]
    assert problems("format: xml\naccount: a\n") == [
        "m.yaml:1: format: expected one of combined, common, json, csv, got 'xml'"
    ]


@pytest.mark.parametrize(
    ("form", "quote", "said"),
    [("json", "none", "quote: goes with the format csv alone"), ("csv", "single", "expected one of double, none")],
)
def test_quotes_that_cannot_be(form: str, quote: str, said: str) -> None:
    [found] = problems(f"format: {form}\ntime: t\naccount: a\nmeters: [{{meter: m}}]\nquote: {quote}\n")
    assert said in found


@pytest.mark.parametrize(
    ("account", "said"),
    [
        ("{}", "needs either `field` or `value`"),
        ("{field: user, value: a}", "needs either `field` or `value`"),
        ("{value: a, otherwise: b}", "has a constant `value`"),
        ("{field: user, pattern: abc}", "needs exactly one group"),
    ],
)
def test_accounts_that_cannot_be(account: str, said: str) -> None:
    [found] = problems(f"format: combined\naccount: {account}\n")
    assert said in found


def test_options_are_told_as_options() -> None:
    with pytest.raises(DocumentError, match="options:1: account: is required"):
        mapping_of({"format": "combined"})


@pytest.mark.parametrize(
    "text",
    [
        "format: combined\naccount: user\n",
        'format: common\naccount: {value: a}\nroutes: ["/a/{b}"]\nfilters: [{field: status, keep: [2xx]}]\n',
        "format: csv\ntime: {field: t, format: unix_s}\naccount: a\nid: i\nmeters: [{meter: m, quantity: 0.50}]\n",
        "format: csv\ntime: t\naccount: a\nmeters: [{meter: m}]\ndelimiter: ;\ncolumns: [t, a]\nquote: none\n",
    ],
)
def test_what_is_kept_with_a_source_is_the_same_mapping(text: str) -> None:
    mapping = parse_mapping(text)
    kept = json.dumps(mapping.told())
    assert parse_mapping(kept) == mapping
    assert parse_mapping(kept).told() == mapping.told()


def test_what_is_kept_with_a_source_says_only_what_was_said() -> None:
    """A field that is added to mappings later, with a default, must not make the old ones differ."""
    assert set(parse_mapping("format: combined\naccount: user\n").told()) == {
        "format",
        "time",
        "account",
        "meters",
        "dimensions",
    }


def extraction(mapping: Mapping) -> Extraction:
    return Extraction(mapping, "default", "web-1", (NOON_NS - 400 * DAY_NS, NOON_NS + 600 * 10**9))


def of_log(text: str, request: str = "GET /users/7/orders?page=2 HTTP/1.1", status: int | str = 200) -> Line:
    mapping = parse_mapping(f"format: combined\n{text}")
    return extraction(mapping).line(formats.combined(LOG_LINE.format(request, status)))


def of_json(text: str, fields: str) -> Line:
    mapping = parse_mapping(f"format: json\ntime: at\n{text}")
    return extraction(mapping).line(formats.json_line('{"at": "2026-09-01T12:00:00Z", ' + fields + "}"))


def attributes(line: Line) -> MappingType[str, object]:
    [(stream, _)] = line.amounts
    return dict(stream.series.attributes)


def test_an_access_log_brings_method_status_and_a_meter_along() -> None:
    line = of_log("account: user\n")
    [(stream, value)] = line.amounts
    assert (line.account, line.time_ns, line.id) == ("acme", NOON_NS, None)
    assert (stream.series.meter, stream.series.unit, value) == ("api.requests", "{request}", Decimal(1))
    assert attributes(line) == {"http.request.method": "GET", "http.response.status_code": 200}
    assert (stream.scope_name, dict(stream.resource)["service.instance.id"]) == ("tallymark.import", "web-1")


def test_methods_that_nobody_knows_make_no_series_of_their_own() -> None:
    assert attributes(of_log("account: user\n", "XYZZY / HTTP/1.1"))["http.request.method"] == "_OTHER"


@pytest.mark.parametrize(
    ("account", "expected"),
    [
        ("user", "acme"),
        ("{value: me}", "me"),
        ("{field: target, pattern: '/users/([0-9]+)/'}", "7"),
        ("{field: host, lookup: {10.0.0.1: globex}}", "globex"),
        ("{field: host, lookup: {10.0.0.2: globex}, otherwise: public}", "public"),
        ("{field: referrer, otherwise: public}", "public"),
    ],
)
def test_accounts(account: str, expected: str) -> None:
    assert of_log(f"account: {account}\n").account == expected


@pytest.mark.parametrize(
    ("account", "said"),
    [
        ("referrer", "it has no account in the field referrer"),
        ("{field: path, pattern: '/t/(.*)'}", "the account's pattern does not fit the field path"),
        ("{field: host, lookup: {a: b}}", "the account's lookup has no '10.0.0.1'"),
    ],
)
def test_a_line_without_account_is_rejected(account: str, said: str) -> None:
    with pytest.raises(LineFault, match=said):
        of_log(f"account: {account}\n")


ROUTES = """\
account: user
routes:
  - "/users/{id}/orders"
  - {match: "/static/**", route: "/static/{file}"}
  - "/users/{id}"
"""


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("/users/7/orders?page=2", "/users/{id}/orders"),
        ("/users/7/orders/", "/users/{id}/orders"),
        ("/static/a/b.png", "/static/{file}"),
        ("/users/7", "/users/{id}"),
        ("/users/7/secret-9f3", None),
        ("/users//orders", None),
    ],
)
def test_routes_are_templates_and_never_the_path(target: str, route: str | None) -> None:
    assert attributes(of_log(ROUTES, f"GET {target} HTTP/1.1")).get("http.route") == route
    other = attributes(of_log(ROUTES + "unmatched_route: other\n", f"GET {target} HTTP/1.1"))
    assert other["http.route"] == (route or "_other")
    raw = attributes(of_log(ROUTES + "unmatched_route: path\n", f"GET {target} HTTP/1.1"))
    assert raw["http.route"] == (route or target.partition("?")[0])


@pytest.mark.parametrize(
    ("filter_", "counts"),
    [
        ("{field: status, keep: [2xx, 404]}", {200, 404}),
        ("{field: status, skip: [500-599]}", {200, 404}),
        ("{field: status, keep: 503}", set()),
        ("{field: path, skip: ['~^/health']}", {200, 404, 503}),
        ("{field: method, keep: [GET, POST]}", {200, 404, 503}),
        ("{field: referrer, keep: ['~.']}", set()),
    ],
)
def test_filters(filter_: str, counts: set[int]) -> None:
    filter_ = filter_.replace("keep: 503", "keep: ['503']") if counts else filter_.replace("keep: 503", "keep: ['504']")
    taken = set()
    for status in (200, 404, 503):
        try:
            of_log(f"account: user\nfilters: [{filter_}]\n", status=status)
            taken.add(status)
        except LineSkipped:
            pass
    assert taken == counts


def test_several_meters_of_a_line_are_exact_and_the_same_one_adds_up() -> None:
    line = of_json(
        """account: customer.name
meters:
  - {meter: tokens, unit: "{token}", field: usage.in, dimensions: {type: {value: input}}}
  - {meter: tokens, unit: "{token}", field: usage.out, dimensions: {type: {value: output}}}
  - {meter: seconds, unit: s, field: usage.a}
  - {meter: seconds, unit: s, field: usage.b, missing: 0.2}
  - {meter: calls, quantity: 2}
  - {meter: nothing, field: usage.none, missing: 0}
""",
        '"customer": {"name": 12}, "usage": {"in": 12345678901234567890, "out": 7, "a": 0.1}',
    )
    assert line.account == "12"
    assert [(s.series.meter, s.series.attributes.get("type"), value) for s, value in line.amounts] == [
        ("tokens", "input", Decimal("12345678901234567890")),
        ("tokens", "output", Decimal(7)),
        ("seconds", None, Decimal("0.3")),
        ("calls", None, Decimal(2)),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ('"c": "a"', "it has no quantity of tokens in the field n"),
        ('"c": "a", "n": "many"', "the field n is no number: 'many'"),
        ('"c": "a", "n": -1', "a quantity used cannot be -1"),
        ('"c": "a", "n": 1e40', "more than 25 digits before"),
        ('"c": "a", "n": 1e500000', "the field n is no number: '1E\\+500000'"),
        ('"c": "a", "n": -1e-500000', "the field n is no number: '-1E-500000'"),
        ('"c": "a", "n": 1e99999999999999999999', "it cannot be read as JSON: a number has an exponent out of range"),
        ('"c": "a", "other": -1e-99999999999999999999', "a number has an exponent out of range"),
        ('"c": "a", "n": ' + "1" * 5000, "it cannot be read as JSON"),
        ('"c": "a", "n": true', "the field n is no number: 'true'"),
        ('"c": "a", "n": [1]', "the field n is a list"),
        ('"c": {}, "n": 1', "the field c is a nested object"),
        ('"c": null, "n": 1', "it has no account"),
        ('"c": "' + "x" * 300 + '", "n": 1', "must be a string or an integer of at most 256"),
        (r'"c": "\u0000", "n": 1', "the field c holds a character that cannot be stored"),
        (r'"c": "\ud800", "n": 1', "the field c holds a character that cannot be stored"),
        ('"c": "a", "n": NaN', "NaN is no number"),
        ('"c": "a", "n": 1, }', "it is not JSON at character"),
        ('"c": ' + "[" * 200_000, "it cannot be read as JSON"),
    ],
)
def test_events_that_cannot_be_billed(fields: str, said: str) -> None:
    with pytest.raises(LineFault, match=said):
        of_json("account: c\nmeters: [{meter: tokens, field: n}]\n", fields)


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', "null"])
def test_json_that_is_no_object(text: str) -> None:
    with pytest.raises(LineFault, match="no object"):
        formats.json_line(text)


@pytest.mark.parametrize(("content", "said"), [(b"caf\xe9", "byte 4 is not UTF-8"), (b"a\0", "holds a NUL character")])
def test_what_is_no_text(content: bytes, said: str) -> None:
    with pytest.raises(LineFault, match=said):
        formats.text_of(content)


def test_times_that_are_too_old_or_ahead() -> None:
    reading = extraction(parse_mapping("format: json\ntime: at\naccount: c\nmeters: [{meter: m}]\n"))
    for days, kind, said in [(-401, TooOld, "--oldest takes older ones"), (1, LineFault, "past the allowed skew")]:
        at = (NOON + timedelta(days=days)).isoformat()
        with pytest.raises(kind, match=said):
            reading.line(formats.json_line(f'{{"at": "{at}", "c": "a"}}'))


def test_csv_rows() -> None:
    read = formats.csv_row(["a", "b"], formats.Dialect(";"))
    fields = read('"x;""y""";')
    assert (fields("a"), fields("b"), fields("c")) == ('x;"y"', None, None)
    for text, said in [("1;2;3", "it has 3 fields where the header has 2"), ('"a"b;c', "it is not CSV")]:
        with pytest.raises(LineFault, match=said):
            read(text)
