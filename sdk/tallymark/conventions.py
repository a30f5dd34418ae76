"""Names on the wire: the only thing that the SDK and the collector share.

Metric name = meter name, unit in UCUM, scope `SCOPE_NAME`. OpenTelemetry's own names are used where it has a
stable one (`http.*`, `error.type`, `service.*`); the rest stands under `tallymark.`, never in a namespace of
OpenTelemetry's.
"""

from typing import Final

SCOPE_NAME: Final = "tallymark"
"""Instrumentation scope of every metric that the SDK sends."""

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
