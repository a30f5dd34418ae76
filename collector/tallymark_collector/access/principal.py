"""On whose behalf a request comes, and what it may therefore do."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tallymark_collector.errors import Forbidden


class Scope(str, enum.Enum):
    """What a credential is good for. None of them includes another."""

    WRITE = "write"
    """Send usage, of any account of the tenant."""
    READ = "read"
    """Read what is stored of the tenant, all accounts."""
    READ_ACCOUNT = "read-account"
    """Read what is stored of one account. Stands alone."""
    ADMINISTER = "administer"
    """Make and revoke the tenant's credentials, and settle what is in its quarantine."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a tenant's credential, for all of its accounts or for one."""

    tenant: str
    scopes: frozenset[Scope]
    account: str | None = None
    """The only account that it is for; None: all of the tenant's."""
    credential: str = ""
    """The credential's public name, for logs; "" where none was needed."""

    def may_write(self) -> bool:
        """True if it may send usage of its tenant. Whose usage is never asked: it is always its own tenant's."""
        return Scope.WRITE in self.scopes and self.account is None

    def may_read(self, tenant: str, account: str | None = None) -> bool:
        """True if it may read an account of a tenant; None stands for all accounts."""
        if tenant != self.tenant:
            return False
        if Scope.READ in self.scopes and self.account is None:
            return True
        return Scope.READ_ACCOUNT in self.scopes and account is not None and account == self.account

    def may_administer(self, tenant: str) -> bool:
        """True if it may say who does what for a tenant, and what becomes of what could not be billed."""
        return tenant == self.tenant and Scope.ADMINISTER in self.scopes and self.account is None

    def check_write(self) -> None:
        """Raises Forbidden where it may not write."""
        if not self.may_write():
            raise Forbidden(f"{self._named()} may not send usage: that takes one with the scope {Scope.WRITE.value!r}")

    def check_read(self, tenant: str, account: str | None = None) -> None:
        """Raises Forbidden where it may not read. Does not tell whether the tenant or the account exist."""
        if not self.may_read(tenant, account):
            raise Forbidden(f"{self._named()} may not read this")

    def check_administer(self) -> None:
        """Raises Forbidden where it may not administer its tenant."""
        if not self.may_administer(self.tenant):
            wanted = Scope.ADMINISTER.value
            raise Forbidden(f"{self._named()} may not do this: that takes one with the scope {wanted!r}")

    def _named(self) -> str:
        return f"the credential {self.credential}" if self.credential else "who shows no credential"
