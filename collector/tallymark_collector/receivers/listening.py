"""Sockets that are listened on: each address of a host at one port, or none."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from pathlib import Path
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


class Port:
    """A port that is one process's: somebody listens there, and that is us, or it is free."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    def deaf(self) -> bool:
        """True where nobody listens."""
        try:
            check_free(self._host, self._port)
        except UserError:
            return False
        return True


class Ears:
    """A port that processes share, of which this one has sockets of its own; Linux alone tells which."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[Path, str] = {}

    def deaf(self) -> bool:
        """True where none of this process's sockets listens. To look at those that did costs little; all of them are
        gone through where they are closed."""
        if any(_refers(path) == which for path, which in self._known.items()):
            return False
        listening = _listening(self._port)
        self._known = {path: which for path in _OWN.iterdir() if (which := _refers(path)) in listening}
        return not self._known


_OWN = Path("/proc/self/fd")
_LISTEN = "0A"
"""TCP_LISTEN in the kernel's tables."""


def _refers(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""  # closed meanwhile


def _listening(port: int) -> set[str]:
    """Every process's sockets that listen at the port, as links to them are named."""
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError), Path("/proc/self/net", table).open() as lines:
            next(lines)
            for line in lines:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{inode}]")
    return found
