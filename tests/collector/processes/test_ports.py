"""Ports that are shared inside one collector and by nobody else."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from tallymark_collector.errors import UserError
from tallymark_collector.processes.ports import held
from tallymark_collector.receivers.listening import check_free, listen


def close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


def test_children_share_it_and_a_stranger_gets_nothing() -> None:
    with held("127.0.0.1", 0) as port:
        for children in (0, 2):
            with ExitStack() as stack:
                for _ in range(children):
                    stack.callback(close, listen("127.0.0.1", port, shared=True))
                with pytest.raises(UserError, match="is another collector running there"):
                    listen("127.0.0.1", port)
                with pytest.raises(UserError, match="is another collector running there"):
                    check_free("127.0.0.1", port)
                with pytest.raises(UserError, match="is another collector running there"), held("127.0.0.1", port):
                    pass
    check_free("127.0.0.1", port)


def test_a_port_that_somebody_listens_at_is_not_held() -> None:
    taken = listen("127.0.0.1", 0)
    port = taken[0].getsockname()[1]
    try:
        with pytest.raises(UserError, match="is another collector running there"), held("127.0.0.1", port):
            pass
    finally:
        close(taken)


def test_connections_that_are_still_closing_hinder_nobody() -> None:
    server = listen("127.0.0.1", 0)
    port = server[0].getsockname()[1]
    server[0].setblocking(True)
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server[0].accept()
    accepted.close()  # the server's side first: TIME_WAIT is here
    assert client.recv(1) == b""
    client.close()
    close(server)
    with held("127.0.0.1", port) as again:
        assert again == port
        close(listen("127.0.0.1", port, shared=True))
        with pytest.raises(UserError):
            listen("127.0.0.1", port)


def test_every_address_of_a_host_is_held() -> None:
    with held("localhost", 0) as port:
        addresses = {item[4][0] for item in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        for address in addresses:
            with pytest.raises(UserError):
                listen(str(address), port)
