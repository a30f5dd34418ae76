"""What two ways of inserting have in common: which of some items are the first of their key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple


class Distinct(NamedTuple):
    """Items by key. The first of a key is the one that may become a row, whatever comes after it."""

    firsts: list[int]
    """Positions of the items that are the first of their key, in the given order."""
    repeats: dict[int, int]
    """Position of each other item, to the place in `firsts` of the one that it repeats."""


def distinct(keys: Sequence[Hashable] | Mapping[int, Hashable], order: Iterable[int]) -> Distinct:
    """Tells first items from those that repeat one, in that order of positions."""
    places: dict[Hashable, int] = {}
    found = Distinct([], {})
    for position in order:
        place = places.setdefault(keys[position], len(found.firsts))
        if place < len(found.firsts):
            found.repeats[position] = place
        else:
            found.firsts.append(position)
    return found


def already_there(found: Distinct, known: dict[int, Decimal], quantities: Sequence[Decimal]) -> dict[int, Decimal]:
    """The quantity that was stored before each item that is not new, by the item's position.

    `known`: the same for those of `firsts` that were not inserted, by place. Whatever repeats an item finds there what
    that one found, or the item itself.
    """
    there = {found.firsts[place]: quantity for place, quantity in known.items()}
    for position, place in found.repeats.items():
        there[position] = known.get(place, quantities[found.firsts[place]])
    return there
