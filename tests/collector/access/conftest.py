"""Credentials in memory, and clocks that stand still until they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone

import pytest

from tallymark_collector.access import Authenticator, Scope, tokens
from tallymark_collector.access.lookups import LookUps
from tallymark_collector.access.records import Credential

START = datetime(2026, 11, 1, tzinfo=timezone.utc)


@dataclass
class Clock:
    """Seconds that pass when they are told to."""

    seconds: float = 0.0
    paused: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    async def pause(self, seconds: float) -> None:
        self.paused.append(seconds)
        self.seconds += seconds


@dataclass
class Directory:
    """What the database would be: it counts what it is asked, and can be away."""

    rows: dict[str, Credential] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    asked_any: int = 0
    away: Exception | None = None

    async def find(self, keys: Sequence[str]) -> Mapping[str, Credential]:
        self.asked.append(tuple(keys))
        if self.away is not None:
            raise self.away
        return {key: self.rows[key] for key in keys if key in self.rows}

    async def any(self) -> bool:
        self.asked_any += 1
        if self.away is not None:
            raise self.away
        return bool(self.rows)

    def add(
        self,
        tenant: str = "acme-corp",
        scopes: Sequence[Scope] = (Scope.WRITE,),
        account: str | None = None,
        expires_at: datetime | None = None,
    ) -> str:
        """A new token, as text."""
        token = tokens.make()
        names = tuple(scope.value for scope in scopes)
        self.rows[token.id] = Credential(
            token.id, "token", tenant, account, names, token.verifier(), None, "", START, expires_at, None
        )
        return token.text

    def trust(self, identity: str, tenant: str = "acme-corp") -> None:
        self.rows[identity] = Credential(
            tokens.new_id(), "certificate", tenant, None, ("write",), None, identity, "", START, None, None
        )

    def revoke(self, key: str) -> None:
        name = key[4:16] if key.startswith("tmk_") else key
        self.rows[name] = replace(self.rows[name], revoked_at=START)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def lookups(directory: Directory, clock: Clock) -> LookUps:
    return LookUps(directory, clock=clock, pause=clock.pause)


@pytest.fixture
def authenticator(directory: Directory, lookups: LookUps, clock: Clock) -> Authenticator:
    return Authenticator(directory, lookups=lookups, now=clock.now)
