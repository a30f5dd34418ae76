"""What a line bills, by its mapping: an account, a time and quantities of streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import UUID

from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from tallymark import conventions
from tallymark_collector.billing.money import exact
from tallymark_collector.imports import times
from tallymark_collector.imports.access_log import METHODS, OTHER_METHOD, path_of
from tallymark_collector.imports.faults import LineFault, LineSkipped, TooOld
from tallymark_collector.imports.formats import MAX_TEXT, Fields
from tallymark_collector.imports.mapping import Account, Dimension, Mapping, Metered, wants
from tallymark_collector.imports.routes import router
from tallymark_collector.model import Point, Reason, Refusal, Stream, Temporality
from tallymark_collector.processors.redaction import STANDARD, Redaction
from tallymark_collector.processors.streams import StreamCache
from tallymark_collector.processors.validation import check_quantity, check_times
from tallymark_collector.store.rows import timestamp
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric, NumberDataPoint

SCOPE: Final = "tallymark.import"
SERVICE: Final = "tallymark-import"

MAX_STREAMS: Final = 100_000
"""Streams that are remembered by what they are made of; at the limit all are made again as they come."""

_QUANTITY: Final = re.compile(r"[+-]?\d{1,60}(\.\d{1,60})?([eE][+-]?\d{1,2})?", re.ASCII)
_INTEGER: Final = re.compile(r"-?\d{1,18}", re.ASCII)

_Read = Callable[[Fields], "str | int | None"]


class Line(NamedTuple):
    """What one line bills."""

    account: str
    time_ns: int
    id: str | None
    amounts: Sequence[tuple[Stream, Decimal]]
    """Each stream once; quantities of 0 are left out: they bill nothing."""

    def points(self, cause: int) -> list[Point]:
        """The line's points: a call has one time, so each is of (time, time]."""
        return [Point(stream, self.time_ns, self.time_ns, value, cause) for stream, value in self.amounts]


class Extraction:
    """A mapping made ready for lines of one source."""

    def __init__(
        self,
        mapping: Mapping,
        tenant: str,
        source: str,
        window: tuple[int, int],
        redaction: Redaction = STANDARD,
    ) -> None:
        """`window`: the earliest and the latest time that is taken, in nanoseconds since the Unix epoch."""
        assert mapping.time is not None, "a completed mapping"
        self._window = window
        self._id = mapping.id
        self._time_field = mapping.time.field
        self._time = times.reader(mapping.time.format, mapping.time.time_zone)
        self._account = mapping.account
        self._pattern = re.compile(mapping.account.pattern) if mapping.account.pattern else None
        self._meters = mapping.meters
        dimensions = [(name, _dimension(name, of)) for name, of in (mapping.dimensions or {}).items()]
        if mapping.routes or mapping.unmatched_route != "none":
            dimensions.append((conventions.HTTP_ROUTE, _route(mapping)))
        self._dimensions = dimensions
        self._own = [[(name, _dimension(name, of)) for name, of in each.dimensions.items()] for each in mapping.meters]
        self._filters = [
            (each.field, each.keep is not None, lru_cache(1024)(lambda text, of=each: wants(of.keep or of.skip, text)))
            for each in mapping.filters
        ]
        self._streams = _Streams(tenant, source, redaction)

    def line(self, fields: Fields) -> Line:
        """What the line bills. Raises LineSkipped where the mapping leaves it out, LineFault where it is wrong."""
        for field, keeps, fits in self._filters:
            if fits(fields(field)) != keeps:
                raise LineSkipped
        time_ns = self.time(fields)
        if refusal := check_times(time_ns, time_ns, *self._window):
            raise _of_time(refusal, time_ns, self._window[0])
        account = self._whom(self._account, fields)
        shared = [(name, read(fields)) for name, read in self._dimensions]
        amounts: dict[UUID, tuple[Stream, Decimal]] = {}
        for metered, own in zip(self._meters, self._own, strict=True):
            value = _quantity(metered, fields)
            attributes = (*shared, *((name, read(fields)) for name, read in own))
            stream = self._streams.of(metered, account, attributes)
            if value:
                # Two entries of one meter that differ in nothing count together: a point has one value.
                before = amounts.get(stream.id)
                with exact():
                    amounts[stream.id] = (stream, value if before is None else before[1] + value)
        identity = None
        if self._id is not None:
            identity = fields(self._id)
            if not identity:
                raise LineFault(f"it has no id in the field {self._id}")
        return Line(account, time_ns, identity, tuple(amounts.values()))

    def time(self, fields: Fields) -> int:
        """The line's time in nanoseconds since the Unix epoch. Raises LineFault."""
        text = fields(self._time_field)
        if text is None:
            raise LineFault(f"it has no time in the field {self._time_field}")
        return self._time(text)

    def _whom(self, account: Account, fields: Fields) -> str:
        if account.value is not None:
            return account.value
        assert account.field is not None, "either is given"
        text = fields(account.field)
        problem = f"it has no account in the field {account.field}"
        if text is not None and self._pattern is not None:
            found = self._pattern.search(text[:MAX_TEXT])
            text = found[1] if found else None
            problem = f"the account's pattern does not fit the field {account.field}"
        if text and account.lookup is not None:
            problem = f"the account's lookup has no {text[:64]!r}"
            text = account.lookup.get(text)
        text = text or account.otherwise
        if not text:
            raise LineFault(problem)
        return text


def _of_time(refusal: Refusal, time_ns: int, oldest_ns: int) -> LineFault:
    if refusal.reason is not Reason.TIME_TOO_OLD:
        return LineFault(f"its time cannot be billed: {refusal.detail}")
    return TooOld(
        f"its time {timestamp(time_ns)} is older than what is taken, which begins with {timestamp(oldest_ns)};"
        " --oldest takes older ones"
    )


def _quantity(metered: Metered, fields: Fields) -> Decimal:
    if metered.field is None:
        return Decimal(1) if metered.quantity is None else metered.quantity
    text = fields(metered.field)
    if text is None:
        if metered.missing is None:
            raise LineFault(f"it has no quantity of {metered.meter} in the field {metered.field}")
        return metered.missing
    if not _QUANTITY.fullmatch(text):
        raise LineFault(f"the field {metered.field} is no number: {text[:64]!r}")
    value = Decimal(text)
    if refusal := check_quantity(value):
        raise LineFault(f"the field {metered.field}: {refusal.detail}")
    return value


def _dimension(name: str, of: Dimension) -> _Read:
    if of.value is not None:
        constant = int(of.value) if of.type == "integer" else of.value
        return lambda _: constant
    field, is_integer, is_method = of.field or "", of.type == "integer", name == conventions.HTTP_METHOD

    def read(fields: Fields) -> str | int | None:
        text = fields(field)
        if text is None:
            return None
        if is_method and text not in METHODS:
            return OTHER_METHOD
        if not is_integer:
            return text
        if not _INTEGER.fullmatch(text):
            raise LineFault(f"the field {field} is no integer: {text[:64]!r}")
        return int(text)

    return read


def _route(mapping: Mapping) -> _Read:
    route_of = lru_cache(16_384)(router([(r.match, r.route) for r in mapping.routes], mapping.unmatched_route))

    def read(fields: Fields) -> str | None:
        text = fields(mapping.route_field)
        return None if text is None else route_of(path_of(text))

    return read


class _Streams:
    """Streams of one source, as an OTLP request of that producer would have them."""

    def __init__(self, tenant: str, source: str, redaction: Redaction) -> None:
        self._tenant = tenant
        resource = Resource(
            attributes=[_key_value(conventions.SERVICE_NAME, SERVICE), _key_value(conventions.SERVICE_INSTANCE, source)]
        )
        self._resource = resource.SerializeToString(deterministic=True)
        self._scope = InstrumentationScope(name=SCOPE).SerializeToString(deterministic=True)
        self._decoded = StreamCache(MAX_STREAMS, redaction=redaction)
        self._known: dict[tuple[object, ...], Stream] = {}

    def of(self, metered: Metered, account: str, attributes: tuple[tuple[str, str | int | None], ...]) -> Stream:
        """The stream, one object for each as long as it is remembered. Raises LineFault where it cannot be billed."""
        key = (metered.meter, metered.unit, account, attributes)
        stream = self._known.get(key)
        if stream is None:
            if len(self._known) >= MAX_STREAMS:
                self._known.clear()
            stream = self._known[key] = self._made(metered, account, attributes)
        return stream

    def _made(self, metered: Metered, account: str, attributes: tuple[tuple[str, str | int | None], ...]) -> Stream:
        metric = Metric(name=metered.meter, unit=metered.unit)
        metric.sum.aggregation_temporality = int(Temporality.DELTA)
        metric.sum.is_monotonic = True
        given = {name: value for name, value in attributes if value is not None} | {conventions.ACCOUNT: account}
        encoded = tuple(_key_value(name, value).SerializeToString() for name, value in sorted(given.items()))
        found = self._decoded.streams(self._tenant, self._resource, self._scope, metric).resolve(
            NumberDataPoint(attributes=encoded)
        )
        if isinstance(found, Refusal):
            raise LineFault(found.detail)
        return found


def _key_value(name: str, value: str | int) -> KeyValue:
    item = KeyValue(key=name)
    if isinstance(value, int):
        item.value.int_value = value
    else:
        item.value.string_value = value
    return item
