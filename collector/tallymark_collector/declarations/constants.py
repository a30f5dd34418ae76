"""Texts and quantities that can be told without running a program."""

from __future__ import annotations

import ast
import enum
from dataclasses import dataclass
from typing import Final

from tallymark_collector.declarations.api import FUNCTION_MAKERS, MEASURES, NUMBERS, UNIT_ARGUMENT
from tallymark_collector.declarations.names import Defined, Expression, External, Meaning, Scope, Tree

MAX_TEXT: Final = 1_000
"""Characters; names and units are shorter."""


class Kind(enum.Enum):
    """What a quantity is where it is no measure."""

    NUMBER = enum.auto()
    FUNCTION = enum.auto()
    UNKNOWN = enum.auto()


@dataclass(frozen=True)
class Measured:
    """A measure; `unit` None where its argument is computed at run time."""

    unit: str | None


def text_of(node: ast.expr, scope: Scope, tree: Tree) -> str | None:
    """The text that an expression always has: a literal, a constant, f-strings and sums of these. Else None."""
    texts = {_text(found, tree) for found in tree.meanings(node, scope)}
    return texts.pop() if len(texts) == 1 else None


def _text(found: Meaning, tree: Tree) -> str | None:
    if not isinstance(found, Expression):
        return None
    if found not in tree.texts:
        tree.texts[found] = None  # a text that is made from itself
        text = _joined(found, tree)
        tree.texts[found] = text if text is not None and len(text) <= MAX_TEXT else None
    return tree.texts[found]


def _joined(found: Expression, tree: Tree) -> str | None:
    match found.node:
        case ast.Constant(value=str() as text):
            return text
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return text_of(value, found.scope, tree)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            several = [left, right]
        case ast.JoinedStr(values=values):
            several = values
        case _:
            return None
    parts = [text_of(part, found.scope, tree) for part in several]
    whole = [part for part in parts if part is not None]
    return "".join(whole) if len(whole) == len(parts) else None


def quantity_of(node: ast.expr, scope: Scope, tree: Tree) -> Kind | Measured:
    """What a declaration's quantity is."""
    kinds = {_quantity(found, tree) for found in tree.meanings(node, scope)}
    return kinds.pop() if len(kinds) == 1 else Kind.UNKNOWN


def _quantity(found: Meaning, tree: Tree) -> Kind | Measured:
    if isinstance(found, Defined):
        return Kind.FUNCTION
    if isinstance(found, External):
        if found.name in MEASURES:
            return Measured(MEASURES[found.name].unit)
        return Kind.FUNCTION if found.name.startswith("builtins.") else Kind.UNKNOWN
    if not isinstance(found, Expression):
        return Kind.UNKNOWN
    match found.node:
        case ast.Lambda():
            return Kind.FUNCTION
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return Kind.NUMBER
        case ast.Call():
            return _called(found.node, found.scope, tree)
        case ast.UnaryOp() | ast.BinOp() if _is_literal_arithmetic(found.node):
            return Kind.NUMBER
        case _:
            return Kind.UNKNOWN


def _is_literal_arithmetic(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.UnaryOp(operand=operand):
            return _is_literal_arithmetic(operand)
        case ast.BinOp(left=left, right=right):
            return _is_literal_arithmetic(left) and _is_literal_arithmetic(right)
        case _:
            return False


def _called(call: ast.Call, scope: Scope, tree: Tree) -> Kind | Measured:
    names = {found.name if isinstance(found, External) else "" for found in tree.meanings(call.func, scope)}
    name = names.pop() if len(names) == 1 else ""
    if name in NUMBERS:
        return Kind.NUMBER
    if name in FUNCTION_MAKERS:
        return Kind.FUNCTION
    measure = MEASURES.get(name)
    if measure is None:
        return Kind.UNKNOWN
    if not measure.from_argument:
        return Measured(measure.unit)
    if any(keyword.arg is None for keyword in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args):
        return Measured(None)
    given = next((keyword.value for keyword in call.keywords if keyword.arg == UNIT_ARGUMENT), None)
    if given is None and measure.position is not None and measure.position < len(call.args):
        given = call.args[measure.position]
    return Measured(measure.unit if given is None else text_of(given, scope, tree))
