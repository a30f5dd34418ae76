"""What each scope may, and that nothing crosses from one tenant or account into another."""

from __future__ import annotations

from itertools import product

import pytest

from tallymark_collector.access import Principal, Scope
from tallymark_collector.errors import Forbidden

TENANTS = ("acme-corp", "Acme-Corp", "acme-corp ", "globex", "", "\u0430cme-corp")
ACCOUNTS = (None, "a", "A", "a ", "b", "", "\u0430")


def test_only_the_scope_write_writes() -> None:
    for scope in Scope:
        account = "a" if scope is Scope.READ_ACCOUNT else None
        principal = Principal("acme-corp", frozenset({scope}), account, "tmk_x")
        assert principal.may_write() == (scope is Scope.WRITE)
        if scope is not Scope.WRITE:
            with pytest.raises(Forbidden, match="tmk_x may not send usage"):
                principal.check_write()


def test_a_reader_reads_its_tenant_and_a_reader_of_an_account_that_account() -> None:
    everything = Principal("acme-corp", frozenset({Scope.READ}))
    one = Principal("acme-corp", frozenset({Scope.READ_ACCOUNT}), "a")
    for tenant, account in product(TENANTS, ACCOUNTS):
        assert everything.may_read(tenant, account) == (tenant == "acme-corp")
        assert one.may_read(tenant, account) == (tenant == "acme-corp" and account == "a")
        if (tenant, account) != ("acme-corp", "a"):
            with pytest.raises(Forbidden):
                one.check_read(tenant, account)


@pytest.mark.parametrize("scope", [Scope.WRITE, Scope.ADMINISTER])
def test_scopes_do_not_include_each_other(scope: Scope) -> None:
    principal = Principal("acme-corp", frozenset({scope}))
    assert not any(principal.may_read(tenant, account) for tenant, account in product(TENANTS, ACCOUNTS))
    assert principal.may_administer("acme-corp") == (scope is Scope.ADMINISTER)
    assert not any(principal.may_administer(tenant) for tenant in TENANTS[1:])


def test_a_principal_of_one_account_never_has_more_whatever_its_scopes_say() -> None:
    """The database refuses such a row; if one came from elsewhere, it must not open anything."""
    odd = Principal("acme-corp", frozenset(Scope), "a")
    assert not odd.may_write()
    assert not odd.may_read("acme-corp")
    assert not odd.may_read("acme-corp", "b")
    assert not odd.may_administer("acme-corp")


def test_an_account_that_is_not_named_is_nobodys() -> None:
    assert not Principal("acme-corp", frozenset({Scope.READ_ACCOUNT}), None).may_read("acme-corp", None)
