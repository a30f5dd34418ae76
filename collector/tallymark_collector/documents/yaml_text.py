"""YAML as text: mappings, lists and strings, with the place of each in the file.

YAML would read `0.0005` as a float, `on:` as true and `2026-01-15` as a date. Prices must stay exact and ids must
stay what was written, so nothing is converted here: every scalar is its text, and only an empty one, `null` or
`~` without quotes is None.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

MAX_DEPTH = 32
MAX_NODES = 1_000_000
"""Limits on what aliases expand to: an alias may stand inside what it names, or double it many times."""

Path: TypeAlias = tuple[int | str, ...]
Place: TypeAlias = tuple[int, int]
"""Line and column, both from 1."""

_START: Place = (1, 1)
_STANDARD = "tag:yaml.org,2002:"
_LANGUAGE = "tag:yaml.org,2002:python/"


@dataclass
class Document:
    """What a file holds. `data` is None where it holds nothing; `faults` are places, paths and messages."""

    data: Any = None
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    faults: list[tuple[Place, Path, str]] = field(default_factory=list)

    def place(self, path: Path, *, of_key: bool = False) -> Place:
        """Where the path's value (or key) stands; for a path that is not in the file, its nearest owner's key."""
        first, second = (self.keys, self.values) if of_key else (self.values, self.keys)
        if path in first or path in second:
            return first[path] if path in first else second[path]
        return self.place(path[:-1], of_key=True) if path else _START


def read_yaml(text: str) -> Document:
    """Reads one YAML document. Never raises: what is wrong is in `faults`."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        document.faults.append((_place(mark), (), f"is not YAML here: {said}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML; remove it"
        document.faults.append((place, (), message))
    except RecursionError:
        document.faults.append((_START, (), f"is nested deeper than {MAX_DEPTH} levels"))
    else:
        if root is not None:
            _Reading(document).read(root)
    return document


def _place(mark: Any) -> Place:
    return _START if mark is None else (mark.line + 1, mark.column + 1)


class _TooMuchError(Exception):
    """A limit is passed: reading on would not end."""


class _Reading:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def read(self, root: yaml.Node) -> None:
        try:
            self._document.data = self._value(root, ())
        except _TooMuchError as limit:
            self._document.faults.append((_place(root.start_mark), (), str(limit)))

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            raise _TooMuchError(f"is nested deeper than {MAX_DEPTH} levels; an alias inside its own anchor never ends")
        if self._nodes > MAX_NODES:
            raise _TooMuchError(f"has more than {MAX_NODES:,} entries once its aliases are written out")
        self._document.values[path] = _place(node.start_mark)
        if not node.tag.startswith(_STANDARD) or node.tag.startswith(_LANGUAGE):
            self._fault(node, path, f"the tag {node.tag} means nothing here; remove it")
        if isinstance(node, yaml.MappingNode):
            return {key: self._value(value, (*path, key)) for key, value in self._entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, place)) for place, item in enumerate(node.value)]
        is_null = node.tag == f"{_STANDARD}null"
        return None if is_null else self._scalar(node, path)

    def _entries(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # An unquoted {request} as a key ends here.
                self._fault(key, path, 'a name must be text; put quotes around it, e.g. "{request}"')
                continue
            name = self._scalar(key, path)
            where = (*path, name)
            if key.tag == f"{_STANDARD}merge":
                self._fault(key, path, "merge keys (<<) are not read; write the fields out, or alias a whole value")
                continue
            if where in self._document.keys:
                first = self._document.keys[where][0]
                self._fault(key, where, f"is given twice, first on line {first}; keep one")
                continue
            self._document.keys[where] = _place(key.start_mark)
            yield name, value

    def _scalar(self, node: yaml.Node, path: Path) -> str:
        """The text. Half of a surrogate pair, which "\\ud800" can write, has no UTF-8 and no place in a message."""
        text = str(node.value)
        readable = text.encode("utf-8", "replace").decode()
        if readable != text:
            self._fault(node, path, "contains half of a surrogate pair; write the character itself")
        return readable

    def _fault(self, node: yaml.Node, path: Path, message: str) -> None:
        self._document.faults.append((_place(node.start_mark), path, message))
