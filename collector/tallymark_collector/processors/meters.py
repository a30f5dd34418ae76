"""Which telemetry is usage.

A metric is usage when its scope is the SDK's, when any of its points names an account (`tallymark.account.id`), or
when it is a sum or a gauge of the name and unit of a meter that the tenant's plans charge for. The whole metric counts
then: a point of it that names no account is kept in quarantine instead of being taken for something else. Without the
last rule that would depend on its neighbours: whoever cuts requests into smaller ones on their way sends what a
producer has added up past its cardinality limit, which names nobody, by itself. All other telemetry is counted and
dropped, the SDK's mirror of its usage for the host's monitoring above all: that usage comes under the SDK's own scope
too.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final, TypeAlias

from tallymark import conventions
from tallymark_collector.wire.tallymark_metrics_view_pb2 import Metric

_ACCOUNT_KEY: Final = conventions.ACCOUNT.encode()

Meter: TypeAlias = tuple[str, str]
"""(name, unit)"""


def is_usage(scope_name: str, metric: Metric, known: Container[Meter] = ()) -> bool:
    """True if the metric's points are to be billed; `known` are meters that the tenant charges for.

    The account's name is looked for as bytes: a false hit (an attribute value that quotes the name) costs a decoding
    and then a quarantined point with a reason, while decoding every foreign metric would cost all of them.
    """
    if scope_name == conventions.SCOPE_NAME:
        return True
    if scope_name == conventions.MIRROR_SCOPE_NAME:
        return False
    kind = metric.WhichOneof("data")
    if kind in ("sum", "gauge") and (metric.name, metric.unit) in known:
        return True
    if kind == "sum":
        return any(_ACCOUNT_KEY in attribute for point in metric.sum.data_points for attribute in point.attributes)
    return _ACCOUNT_KEY in metric.SerializeToString()
