"""Usage metering on OpenTelemetry: what an API's handlers did becomes what its customers are billed.

    tallymark.configure(endpoint="http://localhost:4317")

    @track_usage("images", quantity=lambda result: len(result), unit="{image}")
    def create(...): ...                      with identify(account="acme") in force

The main path of a unit of usage, one module a step:

1. `decorators` runs the handler (`tracked`), then its `tallies` ask `calls` what the call was, `measure` how much it
   used, and `identity` whom it is for;
2. `recording` hands the exact quantity (`quantities`) to the `recorder`, which adds it to a sum in a memory-mapped file
   (`segment`), and to the current span (`spans`), the evidence;
3. each interval (`exporting`) the `journal` cuts: the sums of (start, end] become OTLP requests (`batches`) in a file
   (`parcels`), which are in the `outbox` from then on, and with them what proves that nothing is missing (`totals`);
4. `delivery` sends them (`sending`), unchanged each time, until the collector has acknowledged them.

What is recorded goes out exactly once, or is reported: nothing raises in a handler, nothing is dropped in silence. A
process that is killed leaves its files in its `folder`, and the next one delivers them (`recovery`).
`runtime` holds the process's one instance of all this; a forked child begins with an empty one.
"""

import tallymark.baggage  # noqa: F401 - waits for configure()
from tallymark.assembly import VERSION
from tallymark.decorators import track_usage
from tallymark.errors import DeclarationError, SettingsError, TallymarkError
from tallymark.identity import identify
from tallymark.inside import usage
from tallymark.recording import record
from tallymark.runtime import configure, flush, shutdown

__version__ = VERSION

__all__ = [
    "DeclarationError",
    "SettingsError",
    "TallymarkError",
    "configure",
    "flush",
    "identify",
    "record",
    "shutdown",
    "track_usage",
    "usage",
]
