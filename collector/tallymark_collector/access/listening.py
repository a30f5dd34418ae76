"""Where a collector may listen, given who is let in."""

from __future__ import annotations

import ipaddress

from tallymark_collector.errors import UserError


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, *, needs_credentials: bool, allow_anonymous: bool) -> None:
    """Raises UserError where anybody on the network could write usage and nobody has said that this is meant."""
    if needs_credentials or allow_anonymous or is_loopback(host):
        return
    raise UserError(
        f"--host {host} is reached by others, and no credential has been made: whoever reaches the port could write"
        " usage of any account. Make a token first (`tallymark tokens create --tenant default --scope write`, as the"
        " database's owner), listen on 127.0.0.1, or say --allow-anonymous (TALLYMARK_ALLOW_ANONYMOUS=true) where"
        " something else keeps strangers out"
    )
