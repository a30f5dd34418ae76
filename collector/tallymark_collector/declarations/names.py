"""What a name in a source file stands for: imports, aliases and constants, followed through the files that were read.

Scopes are Python's: a module, classes (not seen from the functions in them), functions, comprehensions. A name that is
bound several times stands for each of the things that it was bound to.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from tallymark_collector.declarations.api import EXPORTED, PACKAGE

MAX_MEANINGS: Final = 30
"""Things that one name may stand for."""

_NOT_READ: Final = frozenset({PACKAGE, "builtins", *sys.stdlib_module_names})
"""Modules that are never a file of the code base, whatever its files are called."""

Parts: TypeAlias = tuple[str, ...]
FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Comprehension: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True)
class External:
    """Something of a module that was not read: "tallymark.record", "builtins.len"."""

    name: str


@dataclass(frozen=True)
class Expression:
    """An expression that is no name, and the scope whose names it uses."""

    node: ast.expr
    scope: Scope


@dataclass(frozen=True)
class Defined:
    """A function or a class of a file that was read; a class has a scope."""

    scope: Scope | None = None


@dataclass(frozen=True)
class Package:
    """A module that was read."""

    module: Module


@dataclass(frozen=True)
class Unknown:
    """What only running the program would tell: a parameter, a loop's variable."""


Meaning: TypeAlias = External | Expression | Defined | Package | Unknown
UNKNOWN: Final = Unknown()


@dataclass(frozen=True)
class Imported:
    """What an import binds a name to. `parts` are absolute; `above` counts a relative import's dots."""

    parts: Parts
    above: int = 0


@dataclass(eq=False)
class Scope:
    """Names and what they were bound to."""

    module: Module
    parent: Scope | None
    is_class: bool = False
    names: dict[str, list[Imported | Meaning]] = field(default_factory=lambda: defaultdict(list))
    stars: list[Imported] = field(default_factory=list)

    def bind(self, statements: Iterable[ast.AST]) -> None:
        """Take in what the statements of this scope bind; not what the functions and classes in them do."""
        for statement in statements:
            self._bind(statement)

    def _bind(self, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.names[node.name].append(Defined())
            case ast.ClassDef():
                inner = self.module.scopes[node] = Scope(self.module, self, is_class=True)
                inner.bind(node.body)
                self.names[node.name].append(Defined(inner))
            case ast.Lambda():
                pass
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                for part in ast.walk(node):
                    if isinstance(part, ast.NamedExpr):
                        self.names[part.target.id].append(UNKNOWN)
            case ast.Import():
                for alias in node.names:
                    parts = tuple(alias.name.split("."))
                    self.names[alias.asname or parts[0]].append(Imported(parts if alias.asname else parts[:1]))
            case ast.ImportFrom():
                base = tuple(node.module.split(".")) if node.module else ()
                for alias in node.names:
                    if alias.name == "*":
                        self.stars.append(Imported(base, node.level))
                    else:
                        self.names[alias.asname or alias.name].append(Imported((*base, alias.name), node.level))
            case ast.Assign():
                for target in node.targets:
                    self._assign(target, node.value)
                self._bind(node.value)
            case ast.AnnAssign() if node.value is None:
                pass
            case ast.AnnAssign() | ast.NamedExpr():
                assert node.value is not None
                self._assign(node.target, node.value)
                self._bind(node.value)
            case ast.Name(ctx=ast.Store()):
                self.names[node.id].append(UNKNOWN)
            case _:
                # `except … as name`, `case … as name`, `case [*name]`, `case {**name}`
                for field_name in ("name", "rest"):
                    if isinstance(name := getattr(node, field_name, None), str) and not isinstance(node, ast.alias):
                        self.names[name].append(UNKNOWN)
                self.bind(ast.iter_child_nodes(node))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Name(), _:
                self.names[target.id].append(Expression(value, self))
            case ((ast.Tuple() | ast.List()), (ast.Tuple() | ast.List())) if len(target.elts) == len(value.elts):
                for one, its in zip(target.elts, value.elts, strict=True):
                    self._assign(one, its)
            case _:
                self._bind(target)


class Module:
    """A file's syntax tree and its names."""

    def __init__(self, file: Path, node: ast.Module) -> None:
        """`file` is absolute."""
        self.node = node
        self.is_package = file.name == "__init__.py"
        parts = file.parts[1:] if file.is_absolute() else file.parts
        self.parts: Parts = parts[:-1] if self.is_package else (*parts[:-1], file.stem)
        self.scopes: dict[ast.AST, Scope] = {}
        self.scope = Scope(self, None)
        self.scope.bind(node.body)
        self.imports: set[str] = set()
        """Every part of every name that is imported anywhere in the file."""
        self._has_outer_names = False
        for part in ast.walk(node):
            if isinstance(part, ast.Global | ast.Nonlocal):
                self._has_outer_names = True
                for name in part.names:
                    self.scope.names[name].append(UNKNOWN)
            elif isinstance(part, ast.Import | ast.ImportFrom):
                for alias in part.names:
                    self.imports.update(alias.name.split("."))
                if isinstance(part, ast.ImportFrom):
                    self.imports.update((part.module or "").split("."))
                    self.imports.update(self.base(part.level)[-1:])

    def base(self, above: int) -> Parts:
        """What a relative import with so many dots begins with."""
        return self.parts[: max(len(self.parts) - above + self.is_package, 0)] if above else ()

    def function_scope(self, node: FunctionNode, parent: Scope) -> Scope:
        """The scope of a function's body."""
        scope = self.scopes.get(node)
        if scope is None:
            scope = self.scopes[node] = Scope(self, parent)
            arguments = node.args
            several = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            for argument in [*several, *filter(None, (arguments.vararg, arguments.kwarg))]:
                scope.names[argument.arg].append(UNKNOWN)
            scope.bind([node.body] if isinstance(node, ast.Lambda) else node.body)
            for name in _names_of_outer_scopes(node) if self._has_outer_names else ():
                scope.names.pop(name, None)
        return scope

    def comprehension_scope(self, node: Comprehension, parent: Scope) -> Scope:
        """The scope of a comprehension."""
        scope = Scope(self, parent)
        scope.bind(generator.target for generator in node.generators)
        return scope


def _names_of_outer_scopes(node: FunctionNode) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Global | ast.Nonlocal):
            yield from part.names


class Tree:
    """The modules of a code base, found by what they are imported as. To be asked when all of them are there: each name
    is followed once."""

    def __init__(self) -> None:
        self._by_name: dict[Parts, list[Module]] = defaultdict(list)
        self._known: dict[tuple[Scope, str], list[Meaning]] = {}
        self.texts: dict[Expression, str | None] = {}
        """What `constants` has found out."""

    def add(self, module: Module) -> None:
        """A module may be imported by any end of its path: where the import system begins is not known."""
        for start in range(len(module.parts)):
            self._by_name[module.parts[start:]].append(module)

    def meanings(self, node: ast.expr, scope: Scope) -> list[Meaning]:
        """All that an expression may stand for, as far as names, attributes of modules and of classes go."""
        if isinstance(node, ast.Name):
            return self._of_name(node.id, scope)
        if isinstance(node, ast.Attribute):
            return _few(
                one for owner in self.meanings(node.value, scope) for one in self._of_attribute(owner, node.attr)
            )
        return [Expression(node, scope)]

    def _of_name(self, name: str, scope: Scope) -> list[Meaning]:
        at: Scope | None = scope
        while at is not None:
            if name in at.names and (at is scope or not at.is_class):
                return self._bound(name, at)
            if at.parent is None and at.stars:
                found = self._bound(name, at)
                if found:
                    return found
            at = at.parent
        return [External(f"builtins.{name}")] if hasattr(builtins, name) else [UNKNOWN]

    def _bound(self, name: str, scope: Scope) -> list[Meaning]:
        key = (scope, name)
        if key not in self._known:
            self._known[key] = []  # where following it leads back to itself, it adds nothing
            if name in scope.names:
                self._known[key] = _few(one for each in scope.names[name] for one in self._of_binding(each, scope))
            else:
                self._known[key] = self._of_stars(name, scope)
        return self._known[key]

    def _of_binding(self, binding: Imported | Meaning, scope: Scope) -> list[Meaning]:
        if isinstance(binding, Imported):
            return self._of_import(binding, scope.module)
        if isinstance(binding, Expression):
            return self.meanings(binding.node, binding.scope)
        return [binding]

    def _of_stars(self, name: str, scope: Scope) -> list[Meaning]:
        for star in scope.stars:
            if star.parts == (PACKAGE,) and not star.above:
                if name in EXPORTED:
                    return [External(f"{PACKAGE}.{name}")]
                continue
            for owner in self._of_import(star, scope.module):
                if isinstance(owner, Package) and (found := self._bound(name, owner.module.scope)):
                    return found
        return []

    def _of_import(self, imported: Imported, by: Module) -> list[Meaning]:
        parts = imported.parts
        if imported.above:
            parts = (*by.base(imported.above), *parts)
        elif parts[0] in _NOT_READ:
            return [External(".".join(parts))]
        for length in range(len(parts), 0, -1):
            module = self._module(parts[:length], by)
            if module is not None:
                found: list[Meaning] = [Package(module)]
                for attribute in parts[length:]:
                    found = _few(one for owner in found for one in self._of_attribute(owner, attribute))
                return found
        return [External(".".join(parts))]

    def _module(self, parts: Parts, by: Module) -> Module | None:
        """The nearest module of this name: the one that shares the longest beginning of its path."""
        known = self._by_name.get(parts, [])
        if not known:
            return None
        near = [_shared(module.parts, by.parts) for module in known]
        return known[near.index(max(near))] if near.count(max(near)) == 1 else None

    def _of_attribute(self, owner: Meaning, name: str) -> list[Meaning]:
        match owner:
            case External():
                parts = (*owner.name.split("."), name)
                modules = [] if parts[0] in _NOT_READ else self._by_name.get(parts, [])  # in a folder without __init__
                return [Package(modules[0]) if len(modules) == 1 else External(".".join(parts))]
            case Package():
                found = self._bound(name, owner.module.scope)
                if found and not all(isinstance(one, Unknown) for one in found):
                    return found
                inner = self._by_name.get((*owner.module.parts, name), [])
                return [Package(inner[0])] if len(inner) == 1 else [UNKNOWN]
            case Defined(scope=Scope() as scope) if name in scope.names:
                return self._bound(name, scope)
            case Expression(node=ast.Constant()) if name == "value":
                return [owner]  # a member of an enumeration
            case _:
                return [UNKNOWN]


def _few(meanings: Iterable[Meaning]) -> list[Meaning]:
    """Each once; UNKNOWN where there are more than anybody wrote on purpose."""
    found = dict.fromkeys(itertools.islice(meanings, 10 * MAX_MEANINGS))
    return [*found] if len(found) <= MAX_MEANINGS else [UNKNOWN]


def _shared(one: Parts, other: Parts) -> int:
    count = 0
    for mine, its in zip(one, other, strict=False):
        if mine != its:
            break
        count += 1
    return count
