"""Names and limits on the wire: the only thing that the SDK and the collector share.

Metric name = meter name, unit in UCUM, scope `SCOPE_NAME`. OpenTelemetry's own names are used where it has a
stable one (`http.*`, `error.type`, `service.*`); the rest stands under `tallymark.`, never in a namespace of
OpenTelemetry's.
"""

from typing import Final

SCOPE_NAME: Final = "tallymark"
"""Instrumentation scope of every metric that the SDK sends."""

MIRROR_SCOPE_NAME: Final = "tallymark.mirror"
"""Scope of the counters that show usage to the host's own monitoring. They are never billed."""

MIRROR_ACCOUNT: Final = "tallymark.account"
"""The account on those counters: another name than ACCOUNT, by which a metric of any scope would be usage."""

ACCOUNT: Final = "tallymark.account.id"
"""The customer that is billed. A point without it is kept in quarantine, never billed."""

PLAN: Final = "tallymark.plan"
"""The account's plan as the service knew it when the call was made (a dimension; pricing uses subscriptions)."""

USER: Final = "user.id"
"""Who acted for the account: on spans only, so that users do not multiply the billed streams."""

METER_PREFIX: Final = "tallymark.meter."
"""A span's `tallymark.meter.<meter name>` is the quantity that the span's call used."""

USAGE_EVENT: Final = "tallymark.usage"
"""Span event that carries usage of an account other than the one named on the span itself."""

CONTROL_SCOPE: Final = "tallymark.control"
"""Instrumentation scope of what the SDK says about the usage that it sends: never usage itself."""

CONTROL_TOTAL: Final = "tallymark.control.total"
"""Cumulative sum: what this producer has recorded of a meter since its run began. A total that one value cannot carry
exactly is the sum of several points, which are told apart by `CONTROL_PART`."""

CONTROL_CLOSED: Final = "tallymark.control.closed"
"""Cumulative sum of 1: the run ended, and its totals at this time are its last."""

CONTROL_EVIDENCE: Final = "tallymark.control.evidence"
"""Delta sum: how much of an account's usage of a meter was written on spans that are recorded and sampled."""

CONTROL_METER: Final = "tallymark.control.meter"
CONTROL_UNIT: Final = "tallymark.control.unit"
CONTROL_ACCOUNT: Final = "tallymark.control.account"
"""Not `ACCOUNT`: a point that carries that is taken for usage."""

CONTROL_PART: Final = "tallymark.control.part"
"""Which of `CONTROL_PARTS` points of one total this is, from 0; absent where the total is one point."""

CONTROL_PARTS: Final = "tallymark.control.parts"

BAGGAGE_HEADER: Final = "baggage"
"""Header of W3C Baggage, by which services tell each other whom a request is for."""

BAGGAGE_ACCOUNT: Final = ACCOUNT
BAGGAGE_PLAN: Final = PLAN
"""Entries of the baggage."""

HTTP_ROUTE: Final = "http.route"
HTTP_METHOD: Final = "http.request.method"
HTTP_STATUS: Final = "http.response.status_code"
ERROR_TYPE: Final = "error.type"

RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
"""Fully qualified, as "package.Service/Method"; "_OTHER" where the server has no such method."""
RPC_STATUS: Final = "rpc.response.status_code"
"""The status's name, as "NOT_FOUND"."""

TASK_NAME: Final = "tallymark.task.name"
"""The kind of task that a queue's worker ran; OpenTelemetry has no name for it."""

TASK_STATE: Final = "tallymark.task.state"
"""How one run of a task ended, as its queue calls it: "SUCCESS", "FAILURE", "RETRY"."""

SERVICE_NAME: Final = "service.name"
SERVICE_NAMESPACE: Final = "service.namespace"
SERVICE_INSTANCE: Final = "service.instance.id"

OVERFLOW: Final = "otel.metric.overflow"
"""OpenTelemetry's mark on the point that swallowed attribute sets past the cardinality limit."""

MAX_DECIMALS: Final = 30
"""Decimal places of a quantity. The SDK refuses finer ones where they are declared or recorded; the collector keeps
points of other clients that have more in quarantine. Sums stay within the digits that are priced exactly."""
