"""Any telemetry becomes usage: a file says which metrics and spans of other people's software are which meter.

    rules = read_rules("meters.yaml")                  # everything wrong with the file, at once
    metering = Metering(rules)
    decode_metrics(tenant, body, cache, limits, now_ns, metering)

`rules` are the file's values, `file` reads them; `kinds` knows which metrics are amounts, and which levels. `metrics`
and `spans` take what fits from a request; what they make of it are points like all others, with the identity of the
stream or span that they came from, so that a retry is found whatever the file drops from the series. What fits and
cannot be billed goes to quarantine, whole.
"""

from tallymark_collector.metering.engine import Metering
from tallymark_collector.metering.file import MetersError, parse_rules, read_rules
from tallymark_collector.metering.rules import Rules

__all__ = ["Metering", "MetersError", "Rules", "parse_rules", "read_rules"]
