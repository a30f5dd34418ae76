"""Why something is in quarantine, in plain words, and what can be done about it: one entry for every Reason."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from tallymark_collector.model import Reason


class Kind(str, enum.Enum):
    """What an item holds."""

    DELTA = "increase"
    CUMULATIVE = "running total"
    LEVEL = "level"
    SPAN = "span"
    USAGE_SPAN = "span that is usage"
    CONTROL = "control total"
    OTHER = "metric that is no sum"


class Option(str, enum.Enum):
    """What a person may decide about an item, as the command line writes it."""

    ACCOUNT = "--account"
    METER = "--meter-name"
    UNIT = "--unit"
    DROP = "--drop"
    ADDITIONAL = "--additional"
    FORCE = "--force"


@dataclass(frozen=True, slots=True)
class Rule:
    """What is known of a Reason."""

    meaning: str
    remedy: str
    """What to change where it comes from, so that no more of it comes."""
    release: str
    """What a release does, or why there is none."""
    needs: frozenset[Option] = frozenset()
    """At least one of these has to be given; none where it can be released as it is."""
    takes: frozenset[Option] = frozenset()
    """What may be given besides."""
    never: Mapping[Kind, str] = field(default_factory=dict)
    """Kinds that cannot be released, with why."""

    def refusal(self, kind: Kind) -> str | None:
        """Why an item of this kind cannot be released, if so."""
        return self.never.get(kind)

    def allows(self, option: Option) -> bool:
        """True if the option makes sense for this Reason."""
        return option in self.needs or option in self.takes


def _not_at_all(why: str) -> dict[Kind, str]:
    return dict.fromkeys(Kind, why)


_BESIDE: Final = frozenset({Option.ADDITIONAL})
_TOTALS: Final = "the next total of the stream that is accepted counts what this one would have"
_NO_EVIDENCE_TWICE: Final = "a call has one quantity of a meter; spans are evidence and bill nothing"

_NEGATIVE: Final = "usage is never negative: give it back by a credit on the invoice, and discard this"
_NO_NUMBER: Final = "there is no number to bill: settle it with the producer, and discard this"
_NO_TIME: Final = "two points without a time cannot be told from one that was sent twice"
_NO_TEMPORALITY: Final = "nobody knows whether the value is an increase or a running total"
_FALLING: Final = (
    "a total that falls is no amount of usage; totals are taken again once they pass the highest, and count from there"
)
_NO_INCREASE: Final = "it is a level where an increase is billed, or a change of a level that nobody knows"
_TOO_LARGE: Final = "have it sent again with a smaller resource: its points, with their own times, are new then"
_NO_SUM: Final = "there is no one number in it that could be billed"

RULES: Final[Mapping[Reason, Rule]] = {
    Reason.ACCOUNT_MISSING: Rule(
        "It is usage, and nothing in it says whose: no tallymark.account.id.",
        "have the service name the account before the call ends (track_usage(account=…), identify(), middleware)",
        "bills it to the account that is given (`attribute`)",
        needs=frozenset({Option.ACCOUNT}),
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
    Reason.ATTRIBUTE_OVERFLOW: Rule(
        "The producer passed its limit of attribute sets and added up what came after in one point"
        " (otel.metric.overflow): usage of accounts that it no longer names.",
        "raise the cardinality limit there",
        "bills it to the one account that is given (`attribute`), where it is known to be that one's alone",
        needs=frozenset({Option.ACCOUNT}),
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
    Reason.ATTRIBUTES_INVALID: Rule(
        "An attribute, the resource or the scope cannot be kept: not readable, too long, too many, a NUL character, or"
        " an account that is no name. The detail says which.",
        "send attributes within the limits",
        "bills it without the attributes that are named (--drop), or with the account that is given (`attribute`)",
        needs=frozenset({Option.DROP, Option.ACCOUNT}),
        takes=frozenset({*_BESIDE, Option.FORCE}),
        never={Kind.OTHER: _NO_SUM},
    ),
    Reason.CONTROL_INVALID: Rule(
        "What a producer says of its own usage makes no sense, so that nothing can be proved with it. It is no usage.",
        "update the SDK; do not change the metrics of the scope tallymark.control on their way",
        "reads it again, in case this version understands more; else discard it: it bills nothing",
        takes=frozenset({Option.FORCE}),
    ),
    Reason.METER_INVALID: Rule(
        "The meter's name or unit is empty, too long, or holds a NUL character.",
        "name the instrument as OpenTelemetry allows",
        "bills it as the meter that is given (--meter-name, --unit)",
        needs=frozenset({Option.METER, Option.UNIT}),
        takes=frozenset({*_BESIDE, Option.FORCE}),
        never={Kind.SPAN: "the meter's name is part of the span; it is evidence and bills nothing"},
    ),
    Reason.RESOURCE_TOO_LARGE: Rule(
        "The resource or the scope is so large that no stream may have a copy of it: all usage of one request beside it"
        " is this one item. The detail says what is too large.",
        "leave out resource attributes that nobody needs (OTEL_RESOURCE_ATTRIBUTES, the SDK's resource detectors)",
        _TOO_LARGE,
        never=_not_at_all(_TOO_LARGE),
    ),
    Reason.TYPE_UNSUPPORTED: Rule(
        "It is a histogram or a summary, or a sum that may fall (UpDownCounter) of which only changes came.",
        "count with a Counter; send an UpDownCounter with cumulative temporality; name a histogram's count or sum in a"
        " file of meters",
        _NO_SUM,
        never={**_not_at_all(_NO_SUM), Kind.LEVEL: _NO_INCREASE},
    ),
    Reason.TEMPORALITY_MISSING: Rule(
        "The sum says neither that it is an increase (delta) nor that it is a running total (cumulative).",
        "set the aggregation temporality",
        _NO_TEMPORALITY,
        never=_not_at_all(_NO_TEMPORALITY),
    ),
    Reason.VALUE_MISSING: Rule(
        "The point has no value.",
        "find out why the producer sends empty points",
        _NO_NUMBER,
        never=_not_at_all(_NO_NUMBER),
    ),
    Reason.VALUE_NOT_FINITE: Rule(
        "The value is not a number, or infinite.",
        "find the division by zero behind it",
        _NO_NUMBER,
        never=_not_at_all(_NO_NUMBER),
    ),
    Reason.VALUE_NEGATIVE: Rule(
        "The value is negative, and usage only grows.",
        "do not count down; an observable counter must not fall within a process",
        _NEGATIVE,
        never=_not_at_all(_NEGATIVE),
    ),
    Reason.VALUE_CONFLICT: Rule(
        "Another quantity is stored for the same stream and interval: two writers under one name (no"
        " service.instance.id, two instruments of one name), or a gateway that changes values.",
        "give each process a service.instance.id of its own",
        "--additional bills it beside what is stored; if it is the same usage measured otherwise, discard it",
        needs=_BESIDE,
        takes=frozenset({Option.FORCE}),
        never={
            Kind.CUMULATIVE: "two running totals of one time are two answers to one question, not two amounts",
            Kind.LEVEL: "a stream stands at one level at a time: two are two answers to one question, not two amounts",
            Kind.SPAN: _NO_EVIDENCE_TWICE,
            Kind.USAGE_SPAN: "one span has one quantity of a meter",
            Kind.CONTROL: "a producer cannot have recorded two totals by one time: the audit must not choose",
        },
    ),
    Reason.VALUE_DECREASED: Rule(
        "A running total fell within one epoch: the producer began again without a new start time, or two write to one"
        " stream.",
        "set start_time_unix_nano anew when counting begins anew; give each process a service.instance.id",
        f"none: {_FALLING}; charge what was used until then",
        never=_not_at_all(_FALLING),
    ),
    Reason.VALUE_OUT_OF_RANGE: Rule(
        "The value has more digits than are summed and priced exactly.",
        "count in a larger unit, or with fewer decimal places",
        "none: sums with it would not be exact",
        never=_not_at_all("sums with it would not be exact"),
    ),
    Reason.NOT_STORABLE: Rule(
        "The database refused it. The detail is the database's own words.",
        "see the detail; of a time that has been dropped nothing can be stored",
        "tries again, and says so if the database still refuses",
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
    Reason.SPAN_SAMPLED: Rule(
        "A file of meters bills the span, and the span says that others like it were never sent: a count of it would be"
        " too low, by nobody knows how much.",
        "bill from the service's metrics, or sample nothing; `sampled: allow` in the file counts what arrives",
        "bills it if the file (--meters) says `sampled: allow` by now: what was sampled away stays unbilled",
        takes=frozenset({Option.ACCOUNT, Option.FORCE}),
    ),
    Reason.STREAMS_LIMITED: Rule(
        "The tenant began more streams within the hour than it may. Streams that were known went on.",
        "find the attribute that takes a new value with each call, or raise the limit (`tallymark tenants set`)",
        "bills it as it is",
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
    Reason.TIME_MISSING: Rule(
        "The point does not say when it ended.",
        "set time_unix_nano",
        _NO_TIME,
        never=_not_at_all(_NO_TIME),
    ),
    Reason.TIME_REVERSED: Rule(
        "It starts after it ends: the clock was set back in between.",
        "keep the producer's clock in step",
        "bills it at its end, as an interval of no length",
        takes=frozenset({*_BESIDE, Option.FORCE}),
        never={
            Kind.CUMULATIVE: f"a total whose start is unknown counts nothing; {_TOTALS}",
            Kind.CONTROL: "a total says of when it is, or nothing",
        },
    ),
    Reason.TIME_AHEAD: Rule(
        "Its time lay in the future when it came: the producer's clock is ahead.",
        "keep the producer's clock in step",
        "bills it as it is once its time has come; --force at once",
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
    Reason.TIME_TOO_OLD: Rule(
        "It is older than points that can be told from a replay for sure.",
        "deliver within the retention of raw points",
        "bills it as it is, if the points of its time are still kept: then a replay is seen. Its period may have ended",
        takes=frozenset({*_BESIDE, Option.FORCE}),
    ),
}

_READ_ANEW: Final = frozenset({Option.ACCOUNT, Option.ADDITIONAL, Option.FORCE})
"""What a meter of a file refused first may have hidden that nobody is named."""

METERED: Final[Mapping[Reason, Rule]] = {
    Reason.ACCOUNT_MISSING: Rule(
        "It is usage by a file of meters, and nothing where the file looks for the account names one.",
        "have the gateway say whose call it is; or give the file another place to look at, or the name in its `map`",
        "bills it, read with the file (--meters), to the account that is given (`attribute`), or as it is where the"
        " file names one by now",
        takes=_READ_ANEW,
    ),
    Reason.ATTRIBUTES_INVALID: Rule(
        "An attribute, the resource or the scope cannot be kept, or what names the account is no name. The detail says"
        " which.",
        "send attributes within the limits, or leave those out of the file's dimensions",
        "bills it, read with the file (--meters), without the attributes that are named (--drop); where one of them was"
        " to name the account, with the one that is given (`attribute`)",
        takes=_READ_ANEW | {Option.DROP},
    ),
    Reason.METER_INVALID: Rule(
        "It comes in another unit than the file of meters expects.",
        "say in the file which `source_unit` it has and by which `factor` it is the meter's",
        "bills it as the file (--meters) reads it by now, if that knows its unit",
        takes=_READ_ANEW,
    ),
    Reason.TYPE_UNSUPPORTED: replace(
        RULES[Reason.TYPE_UNSUPPORTED],
        meaning="A file of meters names it, and its type has not what the meter is made of: a gauge where increases are"
        " billed, a counter where levels are, a histogram of which a `value` is asked. Or it is a sum that may fall"
        " (UpDownCounter) of which only changes came.",
        remedy="say in the file what the metric is: `quantity: count` or `sum` of a histogram, `aggregation: level` of"
        " a meter that gauges feed; send an UpDownCounter with cumulative temporality",
    ),
    **{
        reason: replace(RULES[reason], takes=RULES[reason].takes | _READ_ANEW)
        for reason in (Reason.TIME_TOO_OLD, Reason.TIME_AHEAD, Reason.TIME_REVERSED)
    },
}
"""Of usage that a file of meters takes from other people's telemetry, where that differs."""

UNKNOWN: Final = Rule(
    "A newer version of Tallymark put it here, for a reason that this one does not know.",
    "use that version",
    "none with this version",
    never=_not_at_all("this version of Tallymark does not know the reason: use the newer one"),
)


def rule(reason: str, *, metered: bool = False) -> Rule:
    """The rule of a reason as the database has it; `metered`: of usage by a file of meters."""
    try:
        known = Reason(reason)
        return METERED[known] if metered and known in METERED else RULES[known]
    except (ValueError, KeyError):
        return UNKNOWN
