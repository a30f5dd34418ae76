"""Ports that several processes share (SO_REUSEPORT), and nobody else.

The kernel lets any socket of the same user beside others that all say SO_REUSEPORT; two collectors that were started by
mistake would halve each other's connections in silence. So one socket of the parent's takes the port first, without
that option, as a server that is alone would; and only then says it. It never listens: connections are the children's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tallymark_collector.receivers.listening import addresses_of, taken


@contextmanager
def held(host: str, port: int) -> Iterator[int]:
    """Keeps each address of the host at that port, or at a free one for 0, and tells the port. Raises UserError."""
    with ExitStack() as holding:
        for family, address in addresses_of(host, port):
            both = host.strip("[]") == "::"
            try:
                one = _taken(family, (address[0], port, *address[2:]), both=both)
            except OSError as error:
                raise taken(host, port, error) from None
            port = holding.enter_context(one).getsockname()[1]
        yield port


def _taken(family: socket.AddressFamily, address: tuple[Any, ...], *, both: bool) -> socket.socket:
    try:
        return _bound(family, address, both=both)
    except OSError:
        # Somebody listens; or connections of a former collector are still closing, which hinders nobody who listens.
        with _socket(family, both=both) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        return _bound(family, address, both=both, closing=True)


def _bound(
    family: socket.AddressFamily, address: tuple[Any, ...], *, both: bool, closing: bool = False
) -> socket.socket:
    with ExitStack() as opened:
        one = opened.enter_context(_socket(family, both=both))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(closing))
        one.bind(address)
        # While this is 0, nobody without SO_REUSEPORT has the port as well, listening or not.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.pop_all()
        return one


def _socket(family: socket.AddressFamily, *, both: bool) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))
    return one
