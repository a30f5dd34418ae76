"""Names on the wire: the only thing that the SDK and the collector share.

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

BAGGAGE_HEADER: Final = "baggage"
"""Header of W3C Baggage, by which services tell each other whom a request is for."""

BAGGAGE_ACCOUNT: Final = ACCOUNT
BAGGAGE_PLAN: Final = PLAN
"""Entries of the baggage."""

HTTP_ROUTE: Final = "http.route"
HTTP_METHOD: Final = "http.request.method"
HTTP_STATUS: Final = "http.response.status_code"
ERROR_TYPE: Final = "error.type"

SERVICE_NAME: Final = "service.name"
SERVICE_NAMESPACE: Final = "service.namespace"
SERVICE_INSTANCE: Final = "service.instance.id"

OVERFLOW: Final = "otel.metric.overflow"
"""OpenTelemetry's mark on the point that swallowed attribute sets past the cardinality limit."""
