"""Sockets that are listened on: each address of a host at one port, or none."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any

from tallymark_collector.errors import UserError

BACKLOG = 128


def listen(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets that take connections to every address of the host, at the same port; 0 takes a free one.

    `shared`: beside sockets of the same kind at this port, each taking some of the connections (see `holding`).
    Raises UserError where any address is taken: half a server would look like a whole one.
    """
    plain = host.strip("[]")
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, address in addresses_of(host, port):
            try:
                one = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                # A port whose last connections are still closing is free; one that is listened on stays refused.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    # "::" is both, as gRPC has it; of a name's addresses each gets a socket of its own.
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(plain != "::"))
                one.bind((address[0], port, *address[2:]))
                # Only this refuses a second one that was bound at the same moment.
                one.listen(BACKLOG)
            except OSError as error:
                raise taken(host, port, error) from None
            one.setblocking(False)
            port = one.getsockname()[1]
            sockets.append(one)
        opened.pop_all()
        return sockets


def addresses_of(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Each address of a host once. Raises UserError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def taken(host: str, port: int, error: OSError) -> UserError:
    """What a person is told where a port cannot be had."""
    return UserError(f"cannot listen on {host}:{port}: is another collector running there? ({error.strerror})")


def check_free(host: str, port: int) -> None:
    """Raises UserError where any address of the host is taken at this port: gRPC is content with one that is free.
    Another collector can still come in between; then gRPC's own binding fails, or has the others."""
    if port:
        for one in listen(host, port):
            one.close()
