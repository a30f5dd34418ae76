"""What a receiver asks of access: for whose usage is a request to be taken?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from tallymark_collector.access.authenticator import ANONYMOUS, Authenticator
from tallymark_collector.errors import Unauthenticated
from tallymark_collector.telemetry.requests import of_tenant

Text: TypeAlias = "str | bytes"
Headers: TypeAlias = "Mapping[str, Text] | Iterable[tuple[Text, Text]]"
"""HTTP headers or gRPC metadata; pairs, so that one that came twice is seen twice."""

TenantOf: TypeAlias = Callable[..., Awaitable[str]]
"""Called with the headers and the identities of the client certificate, which may be left out."""


def tenant_of(authenticator: Authenticator) -> TenantOf:
    """What receivers call before they hand on a request."""

    async def found(headers: Headers, certificate: Sequence[str] = ()) -> str:
        """The tenant whose usage it is. Raises Unauthenticated, Forbidden, TransientError."""
        principal = await authenticator.authenticate(authorization_of(headers), certificate)
        of_tenant(principal.tenant)  # before it is refused, where it may not write
        principal.check_write()
        return principal.tenant

    return found


async def anybody(headers: Headers, certificate: Sequence[str] = ()) -> str:
    """For a receiver that is behind no door at all: everything is the default tenant's."""
    del headers, certificate
    return ANONYMOUS.tenant


def authorization_of(headers: Headers) -> str | None:
    """The value of the header authorization, None where there is none. Raises Unauthenticated where there are several:
    two parties on the way might read another one each."""
    pairs: Iterable[tuple[Text, Text]] = headers.items() if isinstance(headers, Mapping) else headers
    found = [value for name, value in pairs if _text(name).lower() == "authorization"]
    if len(found) > 1:
        raise Unauthenticated("the header authorization came more than once: send one")
    return _text(found[0]) if found else None


def _text(value: Text) -> str:
    # Of bytes that are no text nothing is a token either.
    return value if isinstance(value, str) else value.decode("latin-1")
