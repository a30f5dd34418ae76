"""Every place of a file that declares a meter or records usage, with its meter and unit where they can be told."""

from __future__ import annotations

import ast
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from tallymark_collector.declarations.api import (
    FUNCTION_UNIT,
    FUNCTIONS,
    METER_ARGUMENT,
    NUMBER_UNIT,
    QUANTITY_ARGUMENT,
    UNIT_ARGUMENT,
    Function,
    Signature,
)
from tallymark_collector.declarations.constants import Kind, Measured, quantity_of, text_of
from tallymark_collector.declarations.names import Expression, External, Scope, Tree
from tallymark_collector.declarations.sources import Source, Sources, Unreadable

_PARTIAL: Final = "functools.partial"

MAX_PARTIALS: Final = 5
"""Partials of partials that are followed."""


class NoUnit(enum.Enum):
    """Why a place names no unit."""

    INHERITED = "the meter's own"
    COMPUTED = "computed at run time"


@dataclass(frozen=True)
class Use:
    """One place. `meter` None: its name is computed at run time, or the function is handed on; `written` says how."""

    file: str
    line: int
    function: Function
    meter: str | None
    unit: str | NoUnit
    written: str = ""


Argument: TypeAlias = tuple[ast.expr, Scope]


@dataclass(frozen=True)
class _Call:
    """A call of one of the functions, with the arguments that partials of it have added."""

    signature: Signature
    arguments: tuple[Argument, ...]
    named: dict[str, Argument]
    is_open: bool
    """True with *args or **kwargs, which only running it would tell."""

    def argument(self, name: str, position: int | None) -> Argument | None:
        if name in self.named:
            return self.named[name]
        return self.arguments[position] if position is not None and position < len(self.arguments) else None


def uses_in(source: Source, sources: Sources) -> list[Use]:
    """The places of one file, in its order. What cannot be followed to its end is told as unreadable."""
    if source.module not in sources.concerned:
        return []
    scanner = _Scanner(source, sources.tree)
    try:
        scanner.visit(source.module.node)
    except RecursionError:
        sources.unreadable.append(Unreadable(source.name, 1, "is nested too deeply to be followed to its end"))
    return sorted(scanner.found, key=lambda use: use.line)


class _Scanner(ast.NodeVisitor):
    def __init__(self, source: Source, tree: Tree) -> None:
        self._source = source
        self._tree = tree
        self._scope = source.module.scope
        self.found: list[Use] = []

    def visit_Call(self, node: ast.Call) -> None:
        call = self._resolve(node, self._scope)
        if call is not None:
            self._use(node, call)
        makes_partial = _PARTIAL in self._names(node.func) and node.args and self._signature(node.args[0]) is not None
        if call is None and not makes_partial:
            self.visit(node.func)
        for argument in node.args[1:] if makes_partial else node.args:
            self.visit(argument)
        for keyword in node.keywords:
            self.visit(keyword.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._signature(node.value) is None:  # another name for a function is followed
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._handed_on(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not self._handed_on(node):
            self.visit(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outer in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(outer)
        self._inside(self._source.module.scopes.get(node, self._scope), node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._function(node, node.decorator_list, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node, [], [node.body])

    def visit_ListComp(self, node: Any) -> None:
        scope = self._source.module.comprehension_scope(node, self._scope)
        self._inside(scope, list(ast.iter_child_nodes(node)))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp  # noqa: N815

    def _function(self, node: Any, decorators: Sequence[ast.AST], body: Sequence[ast.AST]) -> None:
        arguments: ast.arguments = node.args
        for outer in (*decorators, *arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(outer)
        self._inside(self._source.module.function_scope(node, self._scope), body)

    def _inside(self, scope: Scope, nodes: Sequence[ast.AST]) -> None:
        outer, self._scope = self._scope, scope
        for node in nodes:
            self.visit(node)
        self._scope = outer

    def _names(self, node: ast.expr) -> set[str]:
        return {found.name for found in self._tree.meanings(node, self._scope) if isinstance(found, External)}

    def _signature(self, node: ast.expr) -> Signature | None:
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        return next((FUNCTIONS[name] for name in sorted(self._names(node)) if name in FUNCTIONS), None)

    def _handed_on(self, node: ast.Name | ast.Attribute) -> bool:
        """A function that is not called here: what it will be called with cannot be seen."""
        if not isinstance(node.ctx, ast.Load) or (signature := self._signature(node)) is None:
            return False
        self._add(node, signature.function, None, NoUnit.COMPUTED, f"{ast.unparse(node)} is handed on")
        return True

    def _resolve(self, node: ast.Call, scope: Scope, steps: int = MAX_PARTIALS) -> _Call | None:
        """The call as one of a function in the table, through partials; None for any other."""
        if steps <= 0:
            return None
        own = tuple((argument, scope) for argument in node.args)
        named = {keyword.arg: (keyword.value, scope) for keyword in node.keywords if keyword.arg is not None}
        is_open = any(isinstance(argument, ast.Starred) for argument in node.args) or len(named) < len(node.keywords)
        for found in self._tree.meanings(node.func, scope):
            if isinstance(found, External) and found.name in FUNCTIONS:
                return _Call(FUNCTIONS[found.name], own, named, is_open)
            if isinstance(found, Expression) and isinstance(found.node, ast.Call):
                made = self._partial(found.node, found.scope, steps - 1)
                if made is not None:
                    arguments = (*made.arguments, *own)
                    return _Call(made.signature, arguments, {**made.named, **named}, made.is_open or is_open)
        return None

    def _partial(self, node: ast.Call, scope: Scope, steps: int) -> _Call | None:
        makers = [found.name for found in self._tree.meanings(node.func, scope) if isinstance(found, External)]
        if _PARTIAL not in makers or not node.args:
            return None
        rest = ast.Call(node.args[0], node.args[1:], node.keywords)
        return self._resolve(rest, scope, steps)

    def _use(self, node: ast.Call, call: _Call) -> None:
        function = call.signature.function
        argument = call.argument(METER_ARGUMENT, call.signature.meter)
        if argument is None:
            if call.is_open:
                self._add(node, function, None, NoUnit.COMPUTED, "its arguments are computed at run time")
            return  # usage.add() without a meter, or a call that fails when it is made
        name = None if isinstance(argument[0], ast.Starred) else text_of(*argument, self._tree)
        written = "" if name is not None else f"the meter's name, {ast.unparse(argument[0])}, is computed at run time"
        self._add(node, function, name, self._unit(call), written)

    def _unit(self, call: _Call) -> str | NoUnit:
        given = call.argument(UNIT_ARGUMENT, None) if call.signature.takes_unit else None
        if given is not None and not (isinstance(given[0], ast.Constant) and given[0].value is None):
            return text_of(*given, self._tree) or NoUnit.COMPUTED
        if call.is_open:
            return NoUnit.COMPUTED
        if call.signature.function is not Function.TRACK:
            return NoUnit.INHERITED
        quantity = call.argument(QUANTITY_ARGUMENT, call.signature.quantity)
        kind = Kind.NUMBER if quantity is None else quantity_of(*quantity, self._tree)
        if isinstance(kind, Measured):
            return kind.unit or NoUnit.COMPUTED
        return {Kind.NUMBER: NUMBER_UNIT, Kind.FUNCTION: FUNCTION_UNIT}.get(kind, NoUnit.COMPUTED)

    def _add(self, node: ast.expr, function: Function, meter: str | None, unit: str | NoUnit, written: str) -> None:
        self.found.append(Use(self._source.name, node.lineno, function, meter, unit, written))
