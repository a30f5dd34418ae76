"""From what a request shows of itself to on whose behalf it comes.

A token that is shown counts, and has to be good: a bad one is never taken for none. Without one a client certificate
counts that a tenant is named for. Without either, a request is taken for the default tenant only where nobody has ever
made a credential (such a collector listens on loopback alone) or anonymous requests were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Final

from tallymark_collector.access import tokens
from tallymark_collector.access.lookups import Directory, LookUps
from tallymark_collector.access.principal import Principal, Scope
from tallymark_collector.access.records import Credential
from tallymark_collector.errors import Unauthenticated
from tallymark_collector.settings import DEFAULT_TENANT

ANONYMOUS: Final = Principal(DEFAULT_TENANT, frozenset({Scope.WRITE}))
"""Who shows nothing, where nothing needs to be shown."""

# RFC 6750 and RFC 9110: the scheme in any case, then spaces. Nothing else is forgiven.
_BEARER: Final = re.compile(r"bearer +([\x21-\x7e]+)", re.ASCII | re.IGNORECASE)
MAX_LENGTH: Final = 4096
"""Characters of the header that are looked at."""

_WANTED: Final = "send the header `authorization: Bearer <token>`; `tallymark tokens create` makes a token"


def now_utc() -> datetime:
    """The wall clock."""
    return datetime.now(timezone.utc)


class Authenticator:
    """Says who asks. One event loop owns it."""

    def __init__(
        self,
        directory: Directory,
        *,
        allow_anonymous: bool = False,
        closed: bool = False,
        lookups: LookUps | None = None,
        now: Callable[[], datetime] = now_utc,
    ) -> None:
        """`closed`: credentials are needed though none has been made yet."""
        self._allow_anonymous = allow_anonymous
        self._closed = closed
        self._lookups = lookups if lookups is not None else LookUps(directory)
        self._now = now

    async def authenticate(self, authorization: str | None, certificate: Sequence[str] = ()) -> Principal:
        """Who shows this header's value and a client certificate of these identities (`certificates.of_call`).

        Raises Unauthenticated, or TransientError where that cannot be said now.
        """
        if authorization is not None:
            return await self._by_token(authorization)
        return await self._by_certificate(certificate) or await self._anonymous(shows_certificate=bool(certificate))

    async def needs_credentials(self) -> bool:
        """True if requests without any are refused. Raises TransientError."""
        return not self._allow_anonymous and (self._closed or await self._lookups.any())

    async def _by_token(self, authorization: str) -> Principal:
        found = _BEARER.fullmatch(authorization) if len(authorization) <= MAX_LENGTH else None
        if found is None:
            raise Unauthenticated(f"the header authorization does not hold a bearer token and nothing else: {_WANTED}")
        token = tokens.read(found[1])
        if token is None:
            raise Unauthenticated(
                f"the bearer token is none of Tallymark's, or not whole: one begins with {tokens.PREFIX}_ and has"
                " 66 characters"
            )
        credential = await self._lookups.get(token.id)
        # Whoever does not hold the token learns nothing about it, not even that its id is known.
        if credential is None or credential.verifier is None or not token.matches(credential.verifier):
            raise Unauthenticated("this token is not known here")
        return self._live(credential)

    async def _by_certificate(self, identities: Sequence[str]) -> Principal | None:
        looked_up = [await self._lookups.get(identity) for identity in identities]
        known = [credential for credential in looked_up if credential is not None]
        live = [credential for credential in known if credential.state(self._now()) == "live"]
        if not live:
            return self._live(known[0]) if known else None
        if len({credential.tenant for credential in live}) > 1:
            raise Unauthenticated("this client certificate has names of several tenants: have it issued for one")
        return self._live(live[0])

    def _live(self, credential: Credential) -> Principal:
        state = credential.state(self._now())
        if state != "live":
            raise Unauthenticated(f"the {credential.kind} {credential.name} is {state}: have a new one made")
        return credential.principal()

    async def _anonymous(self, *, shows_certificate: bool) -> Principal:
        if await self.needs_credentials():
            what = "this client certificate is named for no tenant" if shows_certificate else "no credential was sent"
            raise Unauthenticated(f"{what}: {_WANTED}")
        return ANONYMOUS
