"""Our own gRPC services, of proto/tallymark/v1: what is stored, asked and administered over the network.

    a call ─▶ calls: whose credential? ─▶ its one message ─▶ usage | credentials | quarantine: may it? ─▶ an answer
                                                                  │ reading: few at once, each for a short time
                                                                  ▼
                                                          the store, by connections of its own

Every method takes a credential, and asks first whether that is good for it (`access.principal`); the tenant is the
credential's and stands in no request. Nothing here writes usage.
"""

from tallymark_collector.api.reading import AT_ONCE as CONNECTIONS
from tallymark_collector.api.serving import handlers

__all__ = ["CONNECTIONS", "handlers"]
