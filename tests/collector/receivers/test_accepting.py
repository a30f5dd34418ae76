"""What an event loop is told of connections that cannot be accepted; a process that has run out of files is in
`tests/collector/cli/test_open_files.py`."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from tallymark_collector.receivers.accepting import Door, NothingLeftError, Troubles


async def test_one_line_tells_of_many_tries_and_other_troubles_are_told_as_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, troubles = asyncio.get_running_loop(), Troubles()
    for _ in range(100):
        troubles(loop, {"message": "no", "exception": NothingLeftError(errno.EMFILE, "Too many open files")})
    troubles(loop, {"message": "another one", "exception": OSError(errno.EMFILE, "elsewhere")})
    first, second = (record.message for record in caplog.records)
    assert "cannot be accepted (Too many open files), 1 tries until now" in first
    assert second == "another one"


def test_a_door_takes_a_socket_over_and_closes_whom_nobody_wants() -> None:
    wanted = [True, False, True]
    with socket.create_server(("127.0.0.1", 0)) as listening, Door(listening, lambda _: wanted.pop(0)) as door:
        assert listening.fileno() < 0
        for taken in (True, False, True):
            with socket.create_connection(door.getsockname(), timeout=60) as client:
                if taken:
                    connection, address = door.accept()
                    with connection:
                        assert address == client.getsockname()
                else:
                    with pytest.raises(ConnectionAbortedError):
                        door.accept()
                    assert client.recv(1) == b""
