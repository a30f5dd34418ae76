"""What holds for every command: no traceback for a person's mistake, quiet pipes, and the base install."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import types
from importlib.abc import MetaPathFinder

import pytest

from tallymark_collector.cli.app import STATUSES
from tests.collector.cli.conftest import Run, fill, program, used
from tests.support.usage import stream

MAIN = [sys.executable, "-m", "tallymark_collector"]


def test_help_names_every_command_and_status() -> None:
    done = program("--help")
    assert done.returncode == 0
    for name in ("serve", "demo", "usage", "invoice", "plans", "check", "audit", "migrate", "status", "health"):
        assert f"│ {name} " in done.stdout
    assert "".join(STATUSES.split()) in "".join(done.stdout.split())
    assert program("--version").stdout.startswith("tallymark 0.")


def test_a_reader_that_leaves_ends_it_quietly(dsn: str) -> None:
    many = [used(stream(f"account-{number}"), "2024-03-01T10:00:00", 1) for number in range(2000)]
    fill(dsn, *many)
    for form in ("csv", "table"):
        with subprocess.Popen(
            [*MAIN, "usage", "--format", form, "--database", dsn], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141


def test_a_terminal_sees_progress_and_remarks(dsn: str) -> None:
    outer, inner = pty.openpty()
    with subprocess.Popen(
        [*MAIN, "usage", "--database", dsn],
        stdout=subprocess.PIPE,
        stderr=inner,
        env={**os.environ, "TERM": "xterm"},
        text=True,
    ) as process:
        os.close(inner)
        out, _ = process.communicate(timeout=60)
    seen = b""
    with contextlib.suppress(OSError), os.fdopen(outer, "rb", buffering=0) as terminal:
        while piece := terminal.read(4096):  # a pseudo-terminal ends with an error
            seen += piece
    assert b"summing usage" in seen
    assert b"no usage there" in seen
    assert (process.returncode, out) == (0, "")


def test_a_name_that_the_encoding_lacks_is_escaped(dsn: str) -> None:
    fill(dsn, used(stream("Zürich"), "2024-03-01T10:00:00", 1))
    done = program("usage", "--format", "csv", "--database", dsn, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"Z\xfcrich" in done.stdout


def without(module: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from tallymark_collector.__main__ import main; sys.exit(main())"
    )
    return subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)


def test_the_base_install_says_what_to_install() -> None:
    done = without("typer")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'typer'" in done.stderr
    assert "pip install 'tallymark[collector]'" in done.stderr


def test_a_missing_module_of_ours_is_not_hidden() -> None:
    done = without("tallymark_collector.cli.output")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


class _Missing(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "tallymark_collector.demo.run":
            raise ModuleNotFoundError(f"No module named {self._package!r}", name=self._package)


def test_the_demo_gets_its_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    fake = types.ModuleType("tallymark_collector.demo.run")
    fake.run = lambda **options: given.append(options) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert run("demo").exit_code == 7
    assert run("demo", "--json", "--keep", "--requests", "5", "--accounts", "2").exit_code == 7
    assert given == [
        {"keep": False, "as_json": False, "requests": 20_000, "accounts": 200},
        {"keep": True, "as_json": True, "requests": 5, "accounts": 2},
    ]
    assert run("demo", "--requests", "0").exit_code == 2


def test_the_demo_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tallymark_collector.demo.run", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Missing("uvicorn"), *sys.meta_path])
    result = run("demo")
    assert result.exit_code == 2
    assert "pip install 'tallymark[demo]'" in result.stderr
    monkeypatch.setattr(sys, "meta_path", [_Missing("tallymark_collector.typo"), *sys.meta_path[1:]])
    with pytest.raises(ModuleNotFoundError):
        run("demo")
