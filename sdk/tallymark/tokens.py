"""What the answers of language models say of their tokens, in the names of OpenTelemetry's GenAI conventions.

Sources: OpenTelemetry semantic conventions, GenAI (`gen_ai.token.type`, `gen_ai.response.model`); OpenAI's reference
(`usage` of chat completions and of responses: the cached tokens are part of the input); Anthropic's API reference
(`usage` of messages: the cached tokens stand beside the input).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tallymark.dimensions import MAX_VALUE_LENGTH, Value, is_text

TOKEN_UNIT: Final = "{token}"  # noqa: S105 - of a model, no secret
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105
MODEL: Final = "gen_ai.response.model"

_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens by `gen_ai.token.type`, each counted under one type alone, and the model that used them."""

    by_type: Mapping[str, int]
    model: str | None


def find_usage(answer: object, usage_of: Callable[[Any], object] | None = None) -> TokenUsage | None:
    """What an answer, or an item of a streamed one, says of its tokens; None where it says nothing.

    Raises whatever `usage_of` raises, and ValueError for amounts that cannot be.
    """
    if answer is None:
        return None
    usage = usage_of(answer) if usage_of is not None else _get(answer, "usage")
    model = _get(answer, "model")
    if usage is None and usage_of is None:
        # The last event of a streamed answer carries the whole of it; Anthropic's first one the message begun.
        for inner in (_get(answer, "response"), _get(answer, "message")):
            if inner is not None and (usage := _get(inner, "usage")) is not None:
                model = _get(inner, "model")
                break
    if isinstance(usage, TokenUsage):
        return usage
    by_type = None if usage is None else _by_type(usage)
    if by_type is None:
        return None
    named = model if isinstance(model, str) and 0 < len(model) <= MAX_VALUE_LENGTH and is_text(model) else None
    return TokenUsage(by_type, named)


def merge(before: TokenUsage | None, after: TokenUsage) -> TokenUsage:
    """A streamed answer's usage so far: totals that grow from item to item, of which an item may carry a part."""
    if before is None:
        return after
    by_type = {kind: max(before.by_type.get(kind, 0), after.by_type.get(kind, 0)) for kind in _kinds(before, after)}
    return TokenUsage(by_type, after.model or before.model)


def tokens_of(found: object) -> list[tuple[int, Mapping[str, Value]]]:
    """The amounts with their attributes."""
    assert isinstance(found, TokenUsage)
    model: dict[str, Value] = {} if found.model is None else {MODEL: found.model}
    return [(count, {TOKEN_TYPE: kind, **model}) for kind, count in found.by_type.items() if count]


def _kinds(*usages: TokenUsage) -> list[str]:
    return list(dict.fromkeys(kind for usage in usages for kind in usage.by_type))


def _by_type(usage: object) -> dict[str, int] | None:
    given = _count(usage, "input_tokens", "prompt_tokens")
    made = _count(usage, "output_tokens", "completion_tokens")
    if given is None and made is None:
        return None
    by_type = {"input": given or 0, "output": made or 0}
    details = _get(usage, "input_tokens_details") or _get(usage, "prompt_tokens_details")
    cached = None if details is None else _count(details, "cached_tokens")
    if cached:
        if cached > by_type["input"]:
            raise ValueError(f"{cached} cached tokens are more than the {given} of the input that they are part of")
        by_type["input"] -= cached
        by_type["cache_read"] = cached
    for kind, name in (("cache_read", "cache_read_input_tokens"), ("cache_creation", "cache_creation_input_tokens")):
        apart = _count(usage, name)
        if apart:
            by_type[kind] = by_type.get(kind, 0) + apart
    return by_type


def _count(usage: object, *names: str) -> int | None:
    for name in names:
        value = _get(usage, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is no number of tokens: {value!r}")
        return value
    return None


def _get(thing: object, name: str) -> object:
    if isinstance(thing, Mapping):
        return thing.get(name)
    value = getattr(thing, name, _MISSING)
    return None if value is _MISSING or callable(value) else value
