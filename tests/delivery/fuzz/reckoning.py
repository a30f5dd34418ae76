"""What the file of meters has to make of a request, read from OpenTelemetry's own messages by rules written again here.

How an attribute is decoded, and that it cannot be, is the decoder's word; which meter takes an item, for whom and how
much of it, is not.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tallymark import conventions
from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.model import Attributes
from tests.delivery.fuzz.metered import METERS

Worth = tuple[str, str, Fraction]
"""(meter, account, quantity)"""
Source = tuple[str, bool, dict[str, Any]]
"""(meter, whether it has levels, source as the file has it)"""

SPAN_KINDS: Final = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
STATUSES: Final = {0: "unset", 1: "ok", 2: "error"}
_RESERVED: Final = (conventions.SCOPE_NAME, conventions.CONTROL_SCOPE, conventions.MIRROR_SCOPE_NAME)


@dataclass
class Reckoned:
    """A request's items, by what has to become of them."""

    taken: Counter[str] = field(default_factory=Counter)
    """By meter: points and spans that are usage of it, or refused."""
    worth: Counter[Worth] = field(default_factory=Counter)
    """What of it can be billed at most."""
    passed_over: int = 0
    """Metrics, points and spans that are nothing."""
    beside: bool = False
    """Something in it is usage, or evidence, without the file, which is not counted here."""


def reckon(signal: str, body: bytes, tenant: str) -> Reckoned:
    """Counts a request. Raises protobuf's DecodeError."""
    found = Reckoned()
    if signal == "metrics":
        request = ExportMetricsServiceRequest.FromString(body)
        for outer in request.resource_metrics:
            for inner in outer.scope_metrics:
                group = _Group(tenant, outer.resource, inner.scope, "metric")
                for metric in inner.metrics:
                    group.metric(metric, found)
    else:
        traces = ExportTraceServiceRequest.FromString(body)
        for resource in traces.resource_spans:
            for scope in resource.scope_spans:
                group = _Group(tenant, resource.resource, scope.scope, "span")
                for span in scope.spans:
                    group.span(span, found)
    return found


class _Group:
    """What shares a resource and a scope."""

    def __init__(self, tenant: str, resource: Any, scope: Any, signal: str) -> None:
        self.name = self.known_name = scope.name
        self.broken = False
        try:
            self.resource = wire.decode_attributes(resource.attributes)
            wire.decode_attributes(scope.attributes)
        except MalformedRequest:
            self.resource, self.known_name, self.broken = Attributes(), "", True
        self.sources = [one for one in _sources(signal, tenant) if self._fits(one[2])]

    def _fits(self, source: dict[str, Any]) -> bool:
        return (
            self.known_name not in _RESERVED
            and ("scope" not in source or _is(source["scope"], self.known_name))
            and _all(source.get("resource", {}), self.resource)
        )

    def metric(self, metric: Any, found: Reckoned) -> None:
        kind = metric.WhichOneof("data") or ""
        named = [one for one in self.sources if fnmatch.fnmatchcase(metric.name, one[2]["metric"])]
        points = getattr(metric, kind).data_points if kind else ()
        is_level = kind == "gauge" or (kind == "sum" and not metric.sum.is_monotonic)
        quantities = ("value",) if kind in ("gauge", "sum") else ("count", "sum")
        fitting = [one for one in named if kind and one[1] is is_level and one[2]["quantity"] in quantities]
        if not fitting:
            exact = [one[0] for one in named if "*" not in one[2]["metric"]]
            if exact and points:
                found.taken[exact[0]] += 1  # all of them are one item
            elif self.name in _RESERVED or conventions.ACCOUNT.encode() in metric.SerializeToString():
                found.beside = True
            else:
                found.passed_over += 1
            return
        for point in points:
            if not point.flags & 1:
                self._point(point, fitting, found)

    def _point(self, point: Any, fitting: list[Source], found: Reckoned) -> None:
        broken = self.broken
        attributes = Attributes()
        try:
            attributes = wire.decode_attributes(point.attributes)
        except MalformedRequest:
            broken = True
        blind = broken or attributes.get(conventions.OVERFLOW) is True
        done: set[str] = set()
        for meter, _, source in fitting:
            if meter in done or not (blind or _all(source.get("where", {}), attributes)):
                continue
            done.add(meter)
            self._count(meter, source, attributes, _measured(point, source["quantity"]), found)
        found.passed_over += not done

    def span(self, span: Any, found: Reckoned) -> None:
        carriers = [span.attributes, *(e.attributes for e in span.events if e.name == conventions.USAGE_EVENT)]
        prefix = conventions.METER_PREFIX
        recorded = {item.key.removeprefix(prefix) for some in carriers for item in some if item.key.startswith(prefix)}
        found.beside |= bool(recorded)
        fitting = [one for one in self.sources if _is_span(one[2], span)]
        try:
            attributes = wire.decode_attributes(span.attributes)
        except MalformedRequest:
            found.taken.update({one[0] for one in fitting})
            found.passed_over += not (fitting or recorded)
            return
        done: set[str] = set()
        for meter, _, source in fitting:
            if meter not in done | recorded and _all(source.get("where", {}), attributes):
                done.add(meter)
                self._count(meter, source, attributes, _of_span(span, source, attributes), found)
        found.passed_over += not (done or recorded)

    def _count(
        self, meter: str, source: dict[str, Any], attributes: Attributes, value: Fraction | None, found: Reckoned
    ) -> None:
        found.taken[meter] += 1
        account = self._account(source["account"], attributes)
        if value is not None and account is not None:
            found.worth[meter, account, value * Fraction(source.get("factor", "1"))] += 1

    def _account(self, places: Any, attributes: Attributes) -> str | None:
        for place in places if isinstance(places, list) else [places]:
            said = place if isinstance(place, dict) else {"attribute": place}
            value = attributes.get(said["attribute"]) if "attribute" in said else self.resource.get(said["resource"])
            if value is None or value in ("", "REDACTED"):
                continue
            name = str(value).removeprefix(said.get("strip_prefix", ""))
            if name:
                return said["map"].get(name) if "map" in said else name
        return None


def _sources(signal: str, tenant: str) -> Iterator[Source]:
    for meter, declared in METERS.items():
        for source in declared["sources"]:
            if signal in source and source.get("tenants", tenant) == tenant:
                yield meter, declared.get("aggregation") == "level", source


def _is_span(source: dict[str, Any], span: Any) -> bool:
    return (
        fnmatch.fnmatchcase(span.name, source["span"])
        and ("kind" not in source or SPAN_KINDS.get(span.kind) in _list(source["kind"]))
        and ("status" not in source or STATUSES.get(span.status.code) in _list(source["status"]))
    )


def _all(asked: dict[str, Any], attributes: Attributes) -> bool:
    return all(_is(condition, attributes.get(name)) for name, condition in asked.items())


def _is(condition: Any, value: Any) -> bool:
    text = _text(value)
    match condition:
        case str():
            return text is not None and fnmatch.fnmatchcase(text, condition)
        case list():
            return any(_is(one, value) for one in condition)
        case {"present": _}:
            return value is not None
        case {"not": other}:
            return not _is(other, value)
    if text is None or isinstance(value, bool) or not _is_plain(text):
        return False
    return Decimal(condition.get("from", "-Infinity")) <= Decimal(text) <= Decimal(condition["to"])


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value) if isinstance(value, (str, int)) else None


def _is_plain(text: str) -> bool:
    """Digits as people write a number, 25 on either side of the point at most."""
    whole, point, rest = text.removeprefix("-").partition(".")
    return all(part.isascii() and part.isdigit() and len(part) <= 25 for part in ([whole, rest] if point else [whole]))


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _measured(point: Any, quantity: str) -> Fraction | None:
    if quantity == "count":
        return Fraction(point.count)
    if quantity == "sum":
        return _double(point.sum)
    return Fraction(point.as_int) if point.WhichOneof("value") == "as_int" else _double(point.as_double)


def _of_span(span: Any, source: dict[str, Any], attributes: Attributes) -> Fraction | None:
    quantity = source.get("quantity", "spans")
    if quantity == "spans":
        return Fraction(1)
    if quantity == "duration":
        return Fraction(span.end_time_unix_nano - span.start_time_unix_nano, 10**9)
    value = attributes.get(quantity["attribute"])
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return Fraction(value) if isinstance(value, int) else _double(value)
    try:
        said = Decimal(value)
    except InvalidOperation:
        return None
    # What is longer than a quantity may be is never billed, and takes long to write out.
    return Fraction(said) if said.is_finite() and abs(said.adjusted()) < 400 else None


def _double(value: float) -> Fraction | None:
    return Fraction(repr(value)) if math.isfinite(value) else None
