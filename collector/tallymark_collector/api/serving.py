"""The services together, over a store whose connections are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tallymark_collector.access import Authenticator
from tallymark_collector.api import credentials, quarantine, usage
from tallymark_collector.api.calls import Calls
from tallymark_collector.api.reading import Readers
from tallymark_collector.receivers.admission import Admission
from tallymark_collector.receivers.arriving import Arriving
from tallymark_collector.receivers.grpc_server import Methods
from tallymark_collector.settings import Settings
from tallymark_collector.store import Store
from tallymark_collector.telemetry.requests import Requests

ARRIVING: Final = 4
"""Messages of one kind of calls of a tenant that arrive at the same time, one of each credential. Nobody counts them
before they are whole, and gRPC takes as large ones as of usage; those of questions are small, and there at once."""
ARRIVING_SECONDS: Final = 5.0


def handlers(
    store: Store, authenticator: Authenticator, settings: Settings, admission: Admission, requests: Requests
) -> Mapping[str, Methods]:
    """gRPC methods by the names of their services. One event loop owns them."""
    readers = Readers(store)
    calls = Calls(authenticator, readers, admission, Arriving(ARRIVING, ARRIVING_SECONDS), requests)
    read_with = quarantine.ReadWith(settings.meters, settings.redaction)
    return {
        usage.NAME: calls.methods("usage", usage.methods(readers)),
        credentials.NAME: calls.methods("access", credentials.methods(readers)),
        quarantine.NAME: calls.methods("quarantine", quarantine.methods(readers, read_with)),
    }
