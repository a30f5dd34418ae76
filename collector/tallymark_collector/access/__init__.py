"""Who may do what.

    a request ─▶ requests.writing_tenant ─▶ Authenticator.authenticate ─▶ Principal ─▶ may_write? ─▶ its tenant
                                                  │ look-ups: cached, bounded, batched
                                                  ▼
                                            records: tenant, credential

A tenant follows from the credential alone: a token (`tokens`) or a client certificate (`certificates`), never from
anything in a request's body. `records` makes, lists and revokes; `tls` reads what a server shows of itself, again when
it changes; `quotas` holds a tenant to its limits.
"""

from tallymark_collector.access.authenticator import Authenticator
from tallymark_collector.access.principal import Principal, Scope

__all__ = ["Authenticator", "Principal", "Scope"]
