"""Random files of meters over random telemetry, against an interpreter that knows nothing of the code under test."""

from __future__ import annotations

import fnmatch
from collections import Counter
from decimal import Decimal
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tallymark_collector.metering import Metering, parse_rules
from tallymark_collector.model import Temporality
from tallymark_collector.processors.decoding import decode_metrics
from tallymark_collector.processors.spans import decode_spans
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import TimeLimits
from tests.support.telemetry import histogram, histogram_point, metrics_of, span, spans_of
from tests.support.usage import BASE, SECOND, number, sum_metric

NOW = BASE + 1000 * SECOND
NAMES = ["http.duration", "http.size", "rpc.duration"]
PATTERNS = [*NAMES, "http.*", "*duration", "*"]
SCOPES = ["kong", "envoy"]
WHO = ["tenant", "user"]
CODES: list[object] = [200, 201, 404, "200", 200.0, True]
FACTORS = {None: Decimal(1), "1000": Decimal(1000), "1/8": Decimal("0.125"), "0.3": Decimal("0.3")}

attributes = st.fixed_dictionaries(
    {},
    optional={
        "tenant": st.sampled_from(["acme", "globex", "", 7]),
        "user": st.sampled_from(["u1", "u2"]),
        "code": st.sampled_from(CODES),
        "route": st.sampled_from(["/a", "/b"]),
    },
)
resources = st.fixed_dictionaries({"service.name": st.sampled_from(SCOPES)}, optional={"tenant": st.just("owner")})
conditions = st.one_of(
    st.sampled_from(["200", "2*", "?04", "true", "/a", ["/a", "/b"], ["404", "20?"]]),
    st.sampled_from([{"present": "true"}, {"present": "false"}, {"from": "200", "to": "299"}, {"to": "300"}]),
    st.sampled_from([{"not": "/a"}, {"not": ["2*"]}, {"is": "2*"}]),
)
wheres = st.dictionaries(st.sampled_from(["code", "route"]), conditions, max_size=2)
MAPPED = {"attribute": "tenant", "map": {"acme": "A"}}
accounts = st.sampled_from(
    ["tenant", ["tenant", "user"], {"resource": "tenant"}, ["user", {"resource": "tenant"}], MAPPED]
)
shared = {
    "where": wheres,
    "account": accounts,
    "dimensions": st.sampled_from([[], ["route"], {"path": "route"}, ["code", {"resource": "service.name"}]]),
    "factor": st.sampled_from(list(FACTORS)),
    "scope": st.sampled_from([None, "kong", ["kong", "e*"]]),
    "resource": st.sampled_from([{}, {"service.name": "kong"}, {"service.name": "e*"}]),
}
metric_sources = st.fixed_dictionaries(
    {**shared, "metric": st.sampled_from(PATTERNS), "quantity": st.sampled_from(["value", "count", "sum"])}
)
span_sources = st.fixed_dictionaries(
    {
        **shared,
        "span": st.sampled_from(PATTERNS),
        "quantity": st.sampled_from(["spans", {"attribute": "n"}]),
        "kind": st.sampled_from([[], ["server"], ["client", "server"]]),
    }
)
files = st.lists(st.lists(st.one_of(metric_sources, span_sources), min_size=1, max_size=3), min_size=1, max_size=3)
numbers = st.sampled_from([0, 1, 3, 0.1, 2.5])
items = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["counter", "histogram", "gauge", "updowncounter", "span"]),
            "name": st.sampled_from(NAMES),
            "scope": st.sampled_from(SCOPES),
            "resource": resources,
            "attributes": attributes,
            "value": numbers,
            "count": st.integers(0, 9),
            "kind": st.sampled_from([1, 2, 3]),
        }
    ),
    max_size=12,
)


def text(value: object) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def asked(condition: Any, value: object) -> bool:
    match condition:
        case str():
            return value is not None and fnmatch.fnmatchcase(text(value), condition)
        case list():
            return any(asked(each, value) for each in condition)
        case {"present": flag}:
            return (value is not None) == (flag == "true")
        case {"is": exact}:
            return value is not None and text(value) == exact
        case {"not": other}:
            return not asked(other, value)
        case _:
            if value is None or isinstance(value, bool):
                return False
            try:
                found = Decimal(text(value))
            except ArithmeticError:
                return False
            return Decimal(condition.get("from", "-inf")) <= found <= Decimal(condition.get("to", "inf"))


def place(where: Any, item: dict[str, Any]) -> object:
    if isinstance(where, str):
        return item["attributes"].get(where)
    if "resource" in where:
        return item["resource"].get(where["resource"])
    return item["attributes"].get(where["attribute"])


def account_of(source: dict[str, Any], item: dict[str, Any]) -> str | None:
    places = source["account"] if isinstance(source["account"], list) else [source["account"]]
    for one in places:
        value = place(one, item)
        if value not in (None, ""):
            mapping = one.get("map") if isinstance(one, dict) else None
            return str(value) if mapping is None else mapping.get(str(value))
    return None


def has_levels(sources: list[dict[str, Any]], wanted: bool) -> bool:
    """Whether a meter is one of levels: where that is wanted, and the file can say it."""
    return wanted and all("metric" in one and one["quantity"] == "value" for one in sources)


def fits(source: dict[str, Any], item: dict[str, Any], levels: bool) -> bool:
    is_span = item["type"] == "span"
    if ("span" in source) is not is_span or not fnmatch.fnmatchcase(
        item["name"], source.get("metric") or source["span"]
    ):
        return False
    if not is_span:
        if (item["type"] in ("gauge", "updowncounter")) is not levels:
            return False
        if (item["type"] == "histogram") is (source["quantity"] == "value"):
            return False
    if is_span and source["kind"] and {1: "internal", 2: "server", 3: "client"}[item["kind"]] not in source["kind"]:
        return False
    return (
        (source["scope"] is None or asked(source["scope"], item["scope"]))
        and all(asked(one, item["resource"].get(name)) for name, one in source["resource"].items())
        and all(asked(one, item["attributes"].get(name)) for name, one in source["where"].items())
    )


def quantity(source: dict[str, Any], item: dict[str, Any]) -> Decimal:
    if source["quantity"] in ("count", "spans"):
        number = Decimal(item["count"] if source["quantity"] == "count" else 1)
    else:
        number = Decimal(str(item["value"]))
    return number * FACTORS[source["factor"]]


def dimensions(source: dict[str, Any], item: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    wanted = source["dimensions"]
    if isinstance(wanted, list):
        wanted = {(one if isinstance(one, str) else one["resource"]): one for one in wanted}
    found = {name: place(one, item) for name, one in wanted.items()}
    return tuple(sorted((name, repr(value)) for name, value in found.items() if value is not None))


def expected(
    file: list[list[dict[str, Any]]], telemetry: list[dict[str, Any]], levels: set[int]
) -> tuple[Counter[Any], int, int]:
    """(usage, items that nobody is named for, items that are nothing)"""
    usage: Counter[Any] = Counter()
    unattributed = foreign = 0
    for item in telemetry:
        nobody = False
        done = False
        for place_, sources in enumerate(file):
            of_levels = has_levels(sources, place_ in levels)
            source = next((one for one in sources if fits(one, item, of_levels)), None)
            if source is None:
                continue
            done = True
            account = account_of(source, item)
            if account is None:
                nobody = True
            else:
                usage[f"m{place_}", account, dimensions(source, item)] += quantity(source, item)  # type: ignore[assignment]
        unattributed += nobody
        foreign += not done
    return usage, unattributed, foreign


def written(file: list[list[dict[str, Any]]], levels: set[int]) -> str:
    meters: dict[str, dict[str, Any]] = {}
    for place_, sources in enumerate(file):
        listed = []
        for source in sources:
            one = {key: value for key, value in source.items() if value not in (None, [], {})}
            if "span" in one:
                one["spans_are_complete"] = "true"
            listed.append(one)
        meters[f"m{place_}"] = {"unit": "1", "sources": listed}
        if has_levels(sources, place_ in levels):
            meters[f"m{place_}"]["aggregation"] = "level"
    return yaml.safe_dump({"meters": meters})


def metric(item: dict[str, Any], at: int) -> Metric:
    if item["type"] == "counter":
        return sum_metric([number(at, at + SECOND, item["value"], item["attributes"])], item["name"], "1")
    if item["type"] == "updowncounter":
        falling = [number(0, at + SECOND, item["value"], item["attributes"])]
        return sum_metric(falling, item["name"], "1", temporality=2, monotonic=False)
    if item["type"] == "gauge":
        gauge = Metric(name=item["name"], unit="1")
        gauge.gauge.data_points.append(number(0, at + SECOND, item["value"], item["attributes"]))
        return gauge
    point = histogram_point(at, at + SECOND, item["count"], float(item["value"]), item["attributes"])
    return histogram([point], item["name"], "1")


@settings(max_examples=400, deadline=None)
@given(files, items, st.integers(1, 200), st.sets(st.integers(0, 2)))
def test_random_rules_over_random_telemetry(file: Any, telemetry: Any, remembered: int, levels: set[int]) -> None:
    metering = Metering(parse_rules(written(file, levels)), limit=remembered)
    cache = StreamCache()
    usage: Counter[Any] = Counter()
    rejected = foreign = 0
    identities = []
    for place_, item in enumerate(telemetry):
        at = BASE + place_ * SECOND
        if item["type"] == "span":
            with_number = {**item["attributes"], "n": item["value"]}
            one = span(place_, with_number, name=item["name"], kind=item["kind"], end_time_unix_nano=at + SECOND)
            body = spans_of(item["resource"], [one], item["scope"]).SerializeToString()
            decoded: Any = decode_spans("default", body, TimeLimits(), NOW, metering)
            assert [e.quantity for e in decoded.evidence] == [p.value for p in decoded.points]
        else:
            body = metrics_of(item["resource"], metric(item, at), scope=item["scope"]).SerializeToString()
            decoded = decode_metrics("default", body, cache, TimeLimits(), NOW, metering)
        rejected += decoded.rejected
        wrong_type = [one for one in decoded.quarantined if one.refusal.reason.value == "type_unsupported"]
        # Whoever names one metric is told that its type has no such quantity; a pattern means its own type alone.
        rejected -= len(wrong_type)
        foreign += decoded.unmatched + len(wrong_type)
        for point in decoded.points:
            series = point.stream.series
            found = tuple(sorted((name, repr(value)) for name, value in series.attributes))
            usage[series.meter, series.account, found] += point.value  # type: ignore[assignment]
            assert (point.stream.temporality is Temporality.LEVEL) is (item["type"] in ("gauge", "updowncounter"))
            identities.append((point.stream.id, point.start_ns, point.time_ns, point.cause))
        assert metering.size <= remembered
    wanted, unattributed, passed_over = expected(file, telemetry, levels)
    assert {key: value for key, value in usage.items() if value} == {k: v for k, v in wanted.items() if v}
    assert len(set(identities)) == len(identities)
    assert (rejected, foreign) == (unattributed, passed_over)
