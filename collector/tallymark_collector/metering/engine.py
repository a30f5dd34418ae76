"""What of a request concerns the file of meters. Most does not: that has to cost next to nothing."""

from __future__ import annotations

from typing import Final, TypeVar

from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from tallymark_collector import wire
from tallymark_collector.errors import MalformedRequest
from tallymark_collector.metering.conditions import failing
from tallymark_collector.metering.memory import Memory
from tallymark_collector.metering.metrics import MetricGroup
from tallymark_collector.metering.origin import Group
from tallymark_collector.metering.rules import RESERVED_SCOPES, Meter, MetricSource, Rules, Source, SpanSource
from tallymark_collector.metering.spans import SpanGroup
from tallymark_collector.model import Attributes, Reason, Refusal
from tallymark_collector.processors.redaction import STANDARD, Redaction

MAX_REMEMBERED: Final = 200_000
"""Names, metrics and streams whose meaning is remembered. At the limit all are forgotten and read again as they
come: about 1 KB each."""
MAX_REMEMBERED_BYTES: Final = 256 * 2**20
"""About what they may take in memory."""


_Kind = TypeVar("_Kind", MetricSource, SpanSource)


class Metering:
    """A file's rules at work. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        rules: Rules,
        *,
        account: str | None = None,
        limit: int = MAX_REMEMBERED,
        redaction: Redaction = STANDARD,
    ) -> None:
        """`account` is who is billed for what names nobody: for usage that is taken out of quarantine again."""
        self.rules = rules
        self._account = account
        self._redaction = redaction
        self._memory = Memory(limit, MAX_REMEMBERED_BYTES)
        self._latest: tuple[bytes, Attributes] | None = None

    @property
    def size(self) -> int:
        """What is remembered now; never more than the limit."""
        return self._memory.size

    def metrics(self, tenant: str, resource: bytes, scope: bytes) -> MetricGroup | None:
        """The metrics of one resource and scope, both as OTLP messages; None where no source fits these."""
        key = ("metrics", tenant, resource, scope)
        if key not in self._memory:
            group = self._group(tenant, resource, scope)
            sources = self._fitting(MetricSource, group)
            self._memory[key] = (
                MetricGroup(group, sources, self._account, self._memory, self._redaction) if sources else None
            )
        found = self._memory[key]
        assert found is None or isinstance(found, MetricGroup), "kept above"
        return found

    def names_metric(self, tenant: str, name: str) -> bool:
        """True if any source takes a tenant's metrics of this name, whatever their resource."""
        sources = self.rules.sources(MetricSource)
        return any(source.is_of(tenant) and source.metric.matches(name) for _, _, _, source in sources)

    def makes(self, tenant: str, meter: str) -> bool:
        """True if the file has a meter of this name that takes anything of the tenant's."""
        found = self.rules.meters.get(meter)
        return found is not None and any(source.is_of(tenant) for source in found.sources)

    def names_span(self, tenant: str, name: str) -> bool:
        """The same of spans."""
        sources = self.rules.sources(SpanSource)
        return any(source.is_of(tenant) and source.span.matches(name) for _, _, _, source in sources)

    def spans(self, tenant: str, resource: Resource, scope: InstrumentationScope) -> SpanGroup | None:
        """The spans of one resource and scope; None where no source fits these."""
        key = ("spans", tenant, resource.SerializeToString(), scope.SerializeToString())
        if key not in self._memory:
            group = self._group(tenant, key[2], key[3])
            sources = [(name, meter.unit, source) for name, meter, source in self._fitting(SpanSource, group)]
            self._memory[key] = (
                SpanGroup(group, sources, self._account, self._memory, self._redaction) if sources else None
            )
        found = self._memory[key]
        assert found is None or isinstance(found, SpanGroup), "kept above"
        return found

    def _fitting(self, kind: type[_Kind], group: Group) -> list[tuple[str, Meter, _Kind]]:
        return [
            (name, meter, source)
            for name, meter, _, source in self.rules.sources(kind)
            if why_not_group(source, group) is None
        ]

    def _resource(self, resource: bytes) -> Attributes:
        """Decoded; once for all scopes of it that come one after the other. Raises MalformedRequest."""
        if self._latest is None or self._latest[0] != resource:
            self._latest = (resource, wire.decode_resource(resource))
        return self._latest[1]

    def _group(self, tenant: str, resource: bytes, scope: bytes) -> Group:
        try:
            attributes, instrumentation = self._resource(resource), wire.decode_scope(scope)
            described = wire.decode_attributes(instrumentation.attributes)
        except MalformedRequest as error:
            broken = Refusal(Reason.ATTRIBUTES_INVALID, str(error))
            return Group(tenant, resource, scope, Attributes(), "", "", Attributes(), broken)
        return Group(
            tenant, resource, scope, attributes, instrumentation.name, instrumentation.version, described, None
        )


def why_not_group(source: Source, group: Group) -> str | None:
    """Why what comes from a tenant's resource and scope is not this source's, or None."""
    if group.scope_name in RESERVED_SCOPES:
        return "it is Tallymark's own, which needs no file"
    if not source.is_of(group.tenant):
        return f"it is tenant {group.tenant}'s, the source takes {', '.join(source.tenants)}'s"
    if source.scope is not None and not any(glob.matches(group.scope_name) for glob in source.scope):
        return f"its scope is {group.scope_name!r}"
    name = failing(source.resource, group.attributes)
    return None if name is None else f"its resource's {name} is not {source.resource[name].written}"
