"""A bound on the tenants that metrics tell apart."""

from __future__ import annotations

from typing import Final

MAX_TENANTS: Final = 100
"""Further ones are counted together."""
OTHER: Final = "other"


class Tenants:
    """Names of tenants as metrics have them: the first so many their own, all others one."""

    def __init__(self, limit: int = MAX_TENANTS) -> None:
        self._limit = limit
        self._known: set[str] = {""}  # a request that was refused before anybody knew whose it is

    def label(self, tenant: str) -> str:
        """The tenant's own name, or that of all others."""
        if tenant in self._known:
            return tenant
        if len(self._known) > self._limit:
            return OTHER
        self._known.add(tenant)
        return tenant
