"""Builds the clients and the gateway of the interop tests: python -m tests.interop.build

Each lands in a folder of the user's cache, named by the sources it was made from, so that nothing is built twice. Where
a tool or the registry is missing, the reason is kept there for the tests to show. A program of ours that does not
compile is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILT = "built.json"
"""{"command": [...]}, or {"missing": why}."""
PATIENCE_S = 900


class MissingError(Exception):
    """A tool or the registry is not there."""


def folder_of(name: str) -> Path:
    """Where the client is built."""
    digest = hashlib.sha256()
    for path in sorted(sources(name)):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tallymark-interop" / f"{name}-{digest.hexdigest()[:16]}"


def sources(name: str) -> list[Path]:
    """The files that a client is made from."""
    left = {"node_modules", "target"}
    return [path for path in (HERE / name).rglob("*") if path.is_file() and not left.intersection(path.parts)]


def fetch(arguments: Sequence[str], folder: Path, ours: str = "\0") -> None:
    """Runs what needs a tool and the registry. Raises MissingError where either is not there, RuntimeError where `ours`
    is in what it says: then our program is at fault."""
    tool = arguments[0]
    if shutil.which(tool) is None:
        raise MissingError(f"there is no {tool} here")
    done = _run(arguments, folder)
    if done.returncode and ours in done.stdout:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}")
    if done.returncode:
        raise MissingError(f"{' '.join(arguments[:3])} failed: {_last_line(done)}")


def compile_(arguments: Sequence[str], folder: Path, **environment: str) -> None:
    """Runs what only needs what is here. Raises RuntimeError."""
    done = _run(arguments, folder, **environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}")


def _run(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    said = [line for line in done.stdout.splitlines() if line.strip()]
    return said[-1].strip()[:200] if said else f"status {done.returncode}, without a word"


def javascript(folder: Path) -> list[str]:
    if shutil.which("node") is None:
        raise MissingError("there is no node here")
    for path in sources("javascript"):
        shutil.copy(path, folder / path.name)
    fetch(["npm", "ci", "--no-progress"], folder)
    return ["node", str(folder / "client.mjs")]


def _go(name: str, folder: Path) -> list[str]:
    fetch(["go", "mod", "download"], HERE / name)
    program = str(folder / name)
    compile_(["go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "."], HERE / name, CGO_ENABLED="0")
    return [program]


def go(folder: Path) -> list[str]:
    return _go("go", folder)


def gateway(folder: Path) -> list[str]:
    return _go("gateway", folder)


def java(folder: Path) -> list[str]:
    if shutil.which("java") is None:
        raise MissingError("there is no java here")
    shutil.copytree(HERE / "java", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("target"))
    # One step, because Maven fetches what it needs as it goes.
    fetch(["mvn", "-B", "-q", "-ntp", "package"], folder, ours="COMPILATION ERROR")
    jars = folder / "target"
    version = next((jars / "lib").glob("opentelemetry-sdk-metrics-*.jar")).stem.removeprefix(
        "opentelemetry-sdk-metrics-"
    )
    # Small and quick to start: it lives for seconds.
    options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", f"-Dinterop.opentelemetry={version}"]
    return ["java", *options, "-cp", f"{jars / 'interop.jar'}:{jars / 'lib'}/*", "interop.Client"]


BUILDERS: dict[str, Callable[[Path], list[str]]] = {
    "gateway": gateway,
    "javascript": javascript,
    "java": java,
    "go": go,
}
"""What takes longest comes first: two are built at a time."""


def build(name: str) -> str:
    """Builds one where it is not there yet, and says what there is."""
    folder = folder_of(name)
    note = folder / BUILT
    if note.exists() and "command" in json.loads(note.read_text()):
        return "is there"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        made: dict[str, object] = {"command": BUILDERS[name](folder)}
    except MissingError as error:
        made = {"missing": str(error)}
    note.write_text(json.dumps(made))
    return f"NOT BUILT: {made['missing']}" if "missing" in made else "built"


def main() -> int:
    with ThreadPoolExecutor(2) as pool:
        for name, said in zip(BUILDERS, pool.map(build, BUILDERS), strict=True):
            print(f"{name}: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
