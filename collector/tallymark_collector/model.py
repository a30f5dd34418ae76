"""The values that cross every stage of the collector, from a decoded request to a committed row.

Times are integers of nanoseconds since the Unix epoch, as OTLP has them; quantities are `Decimal`. Nothing here does
I/O, and nothing here imports anything of ours.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

AttributeValue: TypeAlias = "str | bool | int | float | bytes | None | tuple[AttributeValue, ...] | Attributes"
"""What OTLP's AnyValue can hold."""


class Attributes(tuple[tuple[str, AttributeValue], ...]):
    """Attributes sorted by name, so that their order on the wire does not matter to any identity."""

    __slots__ = ()

    @classmethod
    def of(cls, mapping: Mapping[str, AttributeValue]) -> Attributes:
        """Attributes of a mapping, sorted by name."""
        return cls(sorted(mapping.items()))

    def get(self, name: str) -> AttributeValue:
        """The value under `name`, or None."""
        return next((value for key, value in self if key == name), None)

    def without(self, *names: str) -> Attributes:
        """The same attributes less the named ones."""
        return Attributes((key, value) for key, value in self if key not in names)


class Temporality(enum.IntEnum):
    """OTLP's AggregationTemporality: what a sum's value counts since; LEVEL where it is no amount but what the stream
    stands at: a gauge, or a cumulative sum that may fall."""

    LEVEL = 0
    DELTA = 1
    CUMULATIVE = 2


class Reason(str, enum.Enum):
    """Why something is kept in quarantine instead of being billed."""

    ACCOUNT_MISSING = "account_missing"
    ATTRIBUTE_OVERFLOW = "attribute_overflow"
    ATTRIBUTES_INVALID = "attributes_invalid"
    CONTROL_INVALID = "control_invalid"
    METER_INVALID = "meter_invalid"
    RESOURCE_TOO_LARGE = "resource_too_large"
    TYPE_UNSUPPORTED = "type_unsupported"
    TEMPORALITY_MISSING = "temporality_missing"
    VALUE_MISSING = "value_missing"
    VALUE_NOT_FINITE = "value_not_finite"
    VALUE_NEGATIVE = "value_negative"
    VALUE_CONFLICT = "value_conflict"
    VALUE_DECREASED = "value_decreased"
    VALUE_OUT_OF_RANGE = "value_out_of_range"
    NOT_STORABLE = "not_storable"
    SPAN_SAMPLED = "span_sampled"
    STREAMS_LIMITED = "streams_limited"
    TIME_MISSING = "time_missing"
    TIME_REVERSED = "time_reversed"
    TIME_AHEAD = "time_ahead"
    TIME_TOO_OLD = "time_too_old"


class Refusal(NamedTuple):
    """A reason with the particulars that a person needs to act on it."""

    reason: Reason
    detail: str


class Reading(NamedTuple):
    """What a file of meters takes of a point, where that is not a sum's value as it is."""

    kind: str
    """The type of the metric, as OTLP's Metric calls it."""
    quantity: str
    """value, count or sum."""
    factor: Decimal
    """What it was multiplied by."""


class Origin(NamedTuple):
    """A stream as it stood on the wire: enough to write one of its points as OTLP again."""

    resource: bytes
    scope: bytes
    name: str
    unit: str
    temporality: int
    monotonic: bool
    attributes: tuple[bytes, ...]
    reading: Reading | None = None


class Source(NamedTuple):
    """Where a stream's points come from, if a file of meters takes them: they belong to the source. So counting goes on
    where it was when the file says that somebody else is billed, what the source stands at is one account's at a time,
    and an increase that comes again is one account's too."""

    id: UUID
    """128 bits over the sender's stream and the meter; of totals and levels what is read of a point, of increases the
    sender's whole resource. Not over who is billed."""
    factor: Decimal
    """What a measured total or level was multiplied by."""
    since_ns: int = 0
    """Of totals: what ended by then does not count; 0 where the file says nothing."""
    earlier: UUID | None = None
    """The stream under which an earlier version kept totals that began before `since`."""
    decided: bool = False
    """Of a level: True where a person has said whose it is, whatever the time around it is billed as."""


@dataclass(frozen=True, slots=True)
class Series:
    """What an account is billed by: a meter and its dimensions, whichever process counted it."""

    tenant: str
    account: str
    meter: str
    unit: str
    attributes: Attributes
    """The point's attributes less the account."""
    id: UUID = field(init=False, compare=False)

    def __post_init__(self) -> None:
        identity = fingerprint("series", self.tenant, self.account, self.meter, self.unit, self.attributes)
        object.__setattr__(self, "id", identity)

    def stored(self, account: str, identity: UUID) -> Series:
        """Another one of the same meter that the dictionary has under this identity; its dimensions are not read."""
        found = Series(self.tenant, account, self.meter, self.unit, Attributes())
        object.__setattr__(found, "id", identity)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One producer's series. `id` is the stream's identity under OpenTelemetry's single-writer rule."""

    id: UUID
    series: Series
    temporality: Temporality
    resource: Attributes
    scope_name: str
    origin: Origin
    source: Source | None = None
    """Of metrics that a file of meters takes."""
    row: tuple[bytes, bytes, bytes, bytes] | None = field(default=None, init=False, repr=False)
    """Room for what all rows of the stream repeat, which the store makes once (`store.rows`)."""
    written: bool = field(default=False, init=False, repr=False)
    """Whether this process knows that it is committed: the next request need not bring it again."""


class Point(NamedTuple):
    """One quantity of one stream for (start_time, time]; of a cumulative stream, the total since start_time; of a
    stream of levels, the level at time.

    `start_ns` is 0 where a cumulative producer did not say when it began.
    """

    stream: Stream
    start_ns: int
    time_ns: int
    value: Decimal
    cause: int = 0
    """Of an increase that was taken from totals: 64 bits over the epoch and the total that brought it about, since
    increases and corrections of one stream may share their two times. 0 for a point as it was sent."""
    span: tuple[bytes, ...] = ()
    """Of a span that is usage: an OTLP request with its resource and scope alone, which all such spans share, and the
    span; to keep it whole if it cannot be stored (`wire.encode_span`)."""

    @property
    def metered(self) -> bool:
        """True if a file of meters made it of what somebody else's software sent."""
        stream = self.stream
        if stream.temporality is Temporality.LEVEL:
            return stream.source is not None
        return bool(self.span) or stream.origin.reading is not None

    @property
    def is_base(self) -> bool:
        """True for a total from before its meter's `since`: it bills nothing, and what comes later counts from it."""
        source = self.stream.source
        return source is not None and self.time_ns <= source.since_ns


class Evidence(NamedTuple):
    """A span that shows a single call behind the points."""

    tenant: str
    account: str
    meter: str
    trace_id: bytes
    span_id: bytes
    start_ns: int
    time_ns: int
    quantity: Decimal
    name: str
    service: str
    user: str | None
    attributes: Attributes
    billed: bool = False
    """True if the span is itself what is billed, by a file of meters: its point says then what it contradicts."""


@dataclass(frozen=True, slots=True)
class Producer:
    """One process with the SDK, which says how much it has recorded."""

    tenant: str
    namespace: str
    service: str
    instance: str
    id: UUID = field(init=False, compare=False)

    def __post_init__(self) -> None:
        identity = fingerprint("producer", self.tenant, self.namespace, self.service, self.instance)
        object.__setattr__(self, "id", identity)


class ControlTotal(NamedTuple):
    """What a producer has recorded of a meter in (start_time, time]. A run is what it counts from 0 since one start."""

    producer: Producer
    meter: str
    unit: str
    start_ns: int
    time_ns: int
    total: Decimal
    origin: Origin


class Closing(NamedTuple):
    """A producer's run that has ended at `time`."""

    producer: Producer
    start_ns: int
    time_ns: int


class EvidenceCount(NamedTuple):
    """How much of an account's usage in (start_time, time] a producer wrote on sampled spans."""

    producer: Producer
    account: str
    meter: str
    unit: str
    start_ns: int
    time_ns: int
    quantity: Decimal
    origin: Origin


class Quarantined(NamedTuple):
    """Something that looked like usage and cannot be billed as it is; kept whole, with its reason."""

    tenant: str
    account: str
    meter: str
    time_ns: int
    refusal: Refusal
    signal: str
    """`metrics` or `traces`: which OTLP request `payload` is."""
    payload: bytes
    """An OTLP export request that holds this one point or span, as it came."""
    metered: bool = False
    """True if a file of meters says that it is usage of `meter`: it can be read with such a file only."""
    stream: UUID | None = None
    """Of such a point: the stream that it would have been stored under, where that is known."""
    source: UUID | None = None
    """And the source of which it is."""
    digest_of_sent: bytes = b""
    """Of what came, where `payload` is no longer that: `digest()` of the item as it was."""

    def digest(self) -> bytes:
        """What tells the item from others, the same however often it is sent."""
        if self.digest_of_sent:
            return self.digest_of_sent
        digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
        # Not the detail: it may tell how far off a time is, which differs at each retry.
        # The meter only where a file of meters makes several of one payload: each of them is decided by itself.
        meter = (self.meter.encode(),) if self.metered else ()
        for piece in (self.tenant.encode(), self.refusal.reason.value.encode(), self.payload, *meter):
            digest.update(len(piece).to_bytes(8, "big") + piece)
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction writes: all of it or nothing."""

    points: Sequence[Point] = ()
    evidence: Sequence[Evidence] = ()
    quarantined: Sequence[Quarantined] = ()
    controls: Sequence[ControlTotal] = ()
    closings: Sequence[Closing] = ()
    counts: Sequence[EvidenceCount] = ()

    def __bool__(self) -> bool:
        """True if there is anything to write."""
        return bool(self.points or self.evidence or self.quarantined or self.controls or self.closings or self.counts)

    @property
    def tenant(self) -> str:
        """Whose it is: of its first item. A request, and so its batch, is one tenant's; "" for an empty one."""
        if self.points:
            return self.points[0].stream.series.tenant
        for kept in (self.evidence, self.quarantined):
            if kept:
                return kept[0].tenant
        for said in (self.controls, self.closings, self.counts):
            if said:
                return said[0].producer.tenant
        return ""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What a committed write did with the points and evidence of its batch."""

    inserted: int = 0
    """Points that were new."""
    duplicates: int = 0
    """Points that were there before with the same value."""
    evidence: int = 0
    """Spans that were new."""
    conflicts: Sequence[Quarantined] = ()
    """What was there before with another value, contradicts its own stream, or cannot be stored: now in quarantine."""

    def __add__(self, other: WriteResult) -> WriteResult:
        return WriteResult(
            self.inserted + other.inserted,
            self.duplicates + other.duplicates,
            self.evidence + other.evidence,
            [*self.conflicts, *other.conflicts],
        )


FINGERPRINT_BYTES: Final = 16
"""128 bits: with 64, two of some billions of streams would be expected to collide and one be billed as the other."""


def fingerprint(*parts: object) -> UUID:
    """A 128-bit BLAKE2b of the parts, the same in every process and version.

    Values are tagged with their types, so that the integer 1 and the string "1" differ, as they do in OpenTelemetry.
    """
    text = json.dumps([_tagged(part) for part in parts], separators=(",", ":"), ensure_ascii=True)
    return UUID(bytes=hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES).digest())


def _tagged(value: object) -> object:
    match value:
        case Attributes():
            return {key: _tagged(item) for key, item in value}
        case bool():
            return ["b", value]
        case str():
            return value
        case int():
            return ["i", str(value)]
        case float():
            return ["d", repr(value)]
        case bytes():
            return ["y", value.hex()]
        case tuple() | list():
            return ["a", [_tagged(item) for item in value]]
        case None:
            return None
        case _:
            raise TypeError(f"no fingerprint for a {type(value).__name__}")


def cause(epoch_ns: int, sample_ns: int, role: str) -> int:
    """`Point.cause` of what the total at `sample_ns` in the epoch `epoch_ns` brought about; `role` tells two apart."""
    digest = hashlib.blake2b(f"{epoch_ns} {sample_ns} {role}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def attributes_json(attributes: Attributes) -> str:
    """Attributes as a JSON object for people and SQL: bytes become hexadecimal, floats that JSON lacks become strings,
    and NUL, which PostgreSQL's jsonb lacks, becomes U+FFFD."""
    return json.dumps(_plain(attributes), ensure_ascii=False, separators=(",", ":"))


def without_nul(text: str) -> str:
    """The text with U+FFFD for each NUL, which PostgreSQL's text and jsonb cannot hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _plain(value: AttributeValue) -> object:
    match value:
        case Attributes():
            return {without_nul(key): _plain(item) for key, item in value}
        case str():
            return without_nul(value)
        case bytes():
            return value.hex()
        case tuple():
            return [_plain(item) for item in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return repr(value)
        case _:
            return value
