"""A folder that the embedded database's own user may enter, and a look at what is left of the processes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest


@contextmanager
def _open_folder() -> Iterator[Path]:
    # Not `tmp_path`: that is closed to others, and as root the database runs as another user.
    folder = Path(tempfile.mkdtemp(prefix="tallymark-e2e-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with _open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    with _open_folder() as folder:
        yield folder


def processes_of(folder: Path) -> list[str]:
    """Running processes whose TMPDIR is the folder: a demo that was given it, and all that came of it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def all_gone(folder: Path, within: float = 60.0) -> list[str]:
    """What still runs when the time is over; empty as soon as nothing does."""
    deadline = time.monotonic() + within
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
