"""Signs that spans are missing: somebody has kept some and thrown the others away.

A sampler that says so leaves its mark on what it keeps: OpenTelemetry's threshold in the W3C tracestate (`ot=th:8` is
one half), its older form (`ot=p:3` is one eighth), and the flag "sampled" that is not set on a span that was exported
all the same. A sampler that leaves no mark cannot be seen here: that the spans are complete has to be said by a person.
"""

from __future__ import annotations

import re
from typing import Final

from opentelemetry.proto.trace.v1.trace_pb2 import Span

_THRESHOLD: Final = re.compile("[0-9a-f]{1,14}", re.ASCII)
_SAMPLED: Final = 0x001
_TELLS_FLAGS: Final = 0x100
"""SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: whoever sets it fills the flags; all 0 means that nobody did."""


def sign_of_sampling(span: Span) -> str | None:
    """What says that other spans like this one are missing, or None where nothing does."""
    if span.flags & _TELLS_FLAGS and not span.flags & _SAMPLED:
        return f"its trace flags ({span.flags & 0xFF:#04x}) say that it was not sampled"
    for member in span.trace_state.split(","):
        vendor, _, fields = member.strip().partition("=")
        if vendor != "ot":
            continue
        for item in fields.split(";"):
            name, _, value = item.partition(":")
            # A threshold that cannot be read cannot be known to be 0.
            if (name == "th" and (not _THRESHOLD.fullmatch(value) or value.strip("0"))) or (
                name == "p" and value != "0"
            ):
                return f"its tracestate says ot={name}:{value[:32]}"
    return None
