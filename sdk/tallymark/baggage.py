"""Whom a request is for, carried to the services that it calls, by OpenTelemetry's baggage. Off unless asked for.

A service that *sends* puts account and plan of whoever is identified into the baggage of each call that goes out by
OpenTelemetry's propagation (its instrumentations of HTTP clients, gRPC, queues). It also takes out what came in under
these names: what a stranger writes into a header at the edge goes no further. The user is not sent: a name of a person
is nobody's business in other services, and not needed for a bill.

A service that *accepts* takes them for a request's identity where nobody else was named. Baggage is a header that
whoever reaches the service can write: accept it only where all callers are your own services. And whoever is called
gets it, third parties too: send it only where propagation is confined to your own.

`adopt` is what an integration calls. The sending side stands around the process's propagator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from opentelemetry.propagators.textmap import (
    CarrierT,
    Getter,
    Setter,
    TextMapPropagator,
    default_getter,
    default_setter,
)

from tallymark import conventions, runtime
from tallymark.identity import current_identity, identify
from tallymark.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context

_REPLACEMENT: Final = "\ufffd"
"""What percent-encoded bytes that are no UTF-8 are read as."""


def adopt(header: Callable[[str], str | None]) -> None:
    """For integrations: identify the caller's account, where that is wanted and nobody is identified yet.

    To be called when a call begins to be served, after the integration's own resolver has named somebody or nobody;
    not after one that raised, whose request is nobody's. `header` gives the text of the request's header (or metadata,
    or message attribute) of the lower-case name that it is given, several of them joined by commas, or None; it is
    called only where baggage is accepted. Never raises.
    """
    settings = runtime.active.settings
    if settings is None or not (settings.accepts_baggage or settings.sends_baggage):
        return
    try:
        if settings.sends_baggage:
            _stand_around_propagator()
        if settings.accepts_baggage and current_identity().account is None:
            _identify_by(header(conventions.BAGGAGE_HEADER))
    except Exception as error:
        runtime.current().reporter.error(
            "baggage", "the caller's baggage could not be read: %s", type(error).__name__, exc_info=error
        )


def _identify_by(header: str | None) -> None:
    if not header:
        return
    from opentelemetry import baggage
    from opentelemetry.baggage.propagation import W3CBaggagePropagator
    from opentelemetry.context import Context

    # Into an empty context: the one in force may be of another request on the same connection.
    found = baggage.get_all(W3CBaggagePropagator().extract({conventions.BAGGAGE_HEADER: header}, Context()))
    account, plan = found.get(conventions.BAGGAGE_ACCOUNT), found.get(conventions.BAGGAGE_PLAN)
    if not account:
        return
    if _REPLACEMENT in f"{account}{plan}":
        runtime.current().reporter.warning(
            "baggage.text", "a caller's baggage is not percent-encoded UTF-8; usage is recorded without its account"
        )
        return
    # The checks of identify() are good for strangers' texts too.
    if plan:
        identify(account=str(account), plan=str(plan))
    else:
        identify(account=str(account))


class IdentityPropagator(TextMapPropagator):
    """Another propagator, given whoever is identified when a call goes out."""

    def __init__(self, inner: TextMapPropagator) -> None:
        self._inner = inner

    def extract(
        self, carrier: CarrierT, context: Context | None = None, getter: Getter[CarrierT] = default_getter
    ) -> Context:
        return self._inner.extract(carrier, context, getter)

    def inject(
        self, carrier: CarrierT, context: Context | None = None, setter: Setter[CarrierT] = default_setter
    ) -> None:
        settings = runtime.active.settings
        if settings is not None and settings.sends_baggage:
            try:
                context = _with_identity(context)
            except Exception as error:
                runtime.current().reporter.error(
                    "baggage.send", "an account could not be sent on: %s", type(error).__name__, exc_info=error
                )
        self._inner.inject(carrier, context, setter)

    @property
    def fields(self) -> set[str]:
        return self._inner.fields


def _with_identity(context: Context | None) -> Context:
    """The context with our entries first: propagators leave out what is over their limits from the end."""
    from opentelemetry import baggage

    identity = current_identity()
    own: dict[str, str] = {}
    if identity.account is not None and _survives(identity.account):
        own[conventions.BAGGAGE_ACCOUNT] = identity.account
        if identity.plan is not None and _survives(identity.plan):
            own[conventions.BAGGAGE_PLAN] = identity.plan
    others = baggage.get_all(context)
    context = baggage.clear(context)
    for name, value in own.items():
        context = baggage.set_baggage(name, value, context)
    for name, other in others.items():
        if name not in (conventions.BAGGAGE_ACCOUNT, conventions.BAGGAGE_PLAN):
            context = baggage.set_baggage(name, other, context)
    return context


def _survives(text: str) -> bool:
    """OpenTelemetry's propagator strips what it reads: another account would be billed."""
    if text == text.strip() and _REPLACEMENT not in text:
        return True
    runtime.current().reporter.warning(
        "baggage.send",
        "an account or a plan begins or ends with white space, or holds U+FFFD, and cannot be sent on by baggage",
    )
    return False


def _stand_around_propagator() -> None:
    from opentelemetry import propagate

    inner = propagate.get_global_textmap()
    if isinstance(inner, IdentityPropagator):
        return
    propagate.set_global_textmap(IdentityPropagator(inner))
    if conventions.BAGGAGE_HEADER not in inner.fields:
        runtime.current().reporter.warning(
            "baggage.fields",
            "baggage is to be sent, but this process's propagators (OTEL_PROPAGATORS) have none: called services will "
            "not learn the account",
        )


def _when_configured(settings: Settings) -> None:
    if settings.sends_baggage and not settings.disabled:
        _stand_around_propagator()


runtime.when_configured.append(_when_configured)
