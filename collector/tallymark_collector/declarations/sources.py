"""Which files are read, and their syntax trees. Nothing of them is run."""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tallymark_collector.declarations.api import PACKAGE
from tallymark_collector.declarations.names import Module, Tree
from tallymark_collector.errors import UserError

MAX_FILE_BYTES: Final = 4 * 1024 * 1024

SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
"""Folders that hold nobody's own code; hidden ones (.git, .venv, .tox) and virtual environments are skipped too."""

BUILT: Final = frozenset({"build", "dist"})
"""Skipped where they are no packages: copies of what stands elsewhere."""


@dataclass(frozen=True)
class Source:
    """A file that could be parsed. `name` is its path as it is told."""

    name: str
    module: Module


@dataclass(frozen=True)
class Unreadable:
    """One that could not."""

    name: str
    line: int
    message: str


@dataclass
class Sources:
    """A code base."""

    files: list[Source] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    concerned: set[Module] = field(default_factory=set)
    """The modules that name the SDK, or import from one that does: only in these can a use of it stand."""
    tree: Tree = field(default_factory=Tree)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Every Python file (`*.py`) below some folders, and the files that are named. Raises UserError where a path is not
    there, or none of them has a Python file."""
    found = Sources()
    seen: set[str] = set()
    for path in paths:
        for file in _files(path):
            real = os.path.realpath(file)
            if real not in seen:
                seen.add(real)
                _read(file, Path(real), found)
    if not seen:
        raise UserError(
            f"there is no Python file in {', '.join(map(str, paths))}: name the folder of your service's code"
        )
    _spread(found)
    return found


def _spread(sources: Sources) -> None:
    importers: dict[str, list[Module]] = defaultdict(list)
    for source in sources.files:
        for name in source.module.imports:
            importers[name].append(source.module)
    waiting = list(sources.concerned)
    while waiting:
        for module in importers.pop(waiting.pop().parts[-1], ()):
            if module not in sources.concerned:
                sources.concerned.add(module)
                waiting.append(module)


def _files(path: Path) -> Iterator[Path]:
    try:
        if not path.is_dir():
            path.stat()
            yield path
            return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not _is_skipped(Path(folder, name)))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _is_skipped(folder: Path) -> bool:
    name = folder.name
    if name.startswith(".") or name in SKIPPED or (folder / "pyvenv.cfg").exists():
        return True
    return name in BUILT and not (folder / "__init__.py").exists()


def _read(file: Path, real: Path, into: Sources) -> None:
    name = str(file)
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            into.unreadable.append(Unreadable(name, 1, f"is larger than {MAX_FILE_BYTES:,} bytes and was not read"))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = Module(real, ast.parse(content, name))
    except SyntaxError as error:
        here = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        into.unreadable.append(Unreadable(name, error.lineno or 1, f"is not valid for {here}: {error.msg}"))
    except OSError as error:
        into.unreadable.append(Unreadable(name, 1, f"cannot be read: {error.strerror or error}"))
    except (ValueError, RecursionError, MemoryError) as error:
        into.unreadable.append(Unreadable(name, 1, f"cannot be parsed: {error or type(error).__name__}"))
    else:
        into.files.append(Source(name, module))
        into.tree.add(module)
        if PACKAGE.encode() in content:
            into.concerned.add(module)
