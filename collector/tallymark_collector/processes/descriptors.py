"""How many files the process may open, and how many connections that leaves room for.

A connection is an open file. Systems give a process 1,024 of them to begin with and let it ask for more; who runs out
cannot connect to the database again, nor write what is to be sent on, nor read a new certificate. So connections get
what is left beside a reserve for all of that.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Final

from tallymark_collector.settings import Settings

RESERVE: Final = 256
"""Files that connections of clients leave: the database's connections, the admin port's, files that are read and
written, connections that are being cut off for others, about 20 for the process itself; they take half of this. Where
the limit is lower than twice the reserve, a half of it."""
_WITHOUT_END: Final = 2**31 - 1


def raised() -> int:
    """Raises the limit to what the system lets this process have, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            hard = soft  # macOS: the system's own bound is below a limit that says "infinity"
    return _WITHOUT_END if hard == resource.RLIM_INFINITY else min(hard, _WITHOUT_END)


def fitted(settings: Settings, limit: int) -> tuple[Settings, str]:
    """The settings with as many connections as so many files leave room for, and what to say of it; "" where that is
    what was asked for. Over HTTP as asked, a half of the room at most; over gRPC the rest."""
    room = max(limit - RESERVE, limit // 2)
    over_http = 0 if settings.http_port is None else min(settings.limits.http_connections, room // 2)
    fitting = replace(settings, connections=replace(settings.connections, most=room - over_http))
    if settings.http_port is None or over_http == settings.limits.http_connections:
        return fitting, ""
    said = (
        f"this process may open {limit} files, which is room for {over_http} connections over HTTP, not"
        f" {settings.limits.http_connections}, and {room - over_http} over gRPC: let it open more (ulimit -n,"
        " LimitNOFILE= of systemd, ulimits of a container)"
    )
    return replace(fitting, limits=replace(settings.limits, http_connections=over_http)), said
