"""What the answers of language models say of their tokens, in the names of OpenTelemetry's GenAI conventions.

Sources:

- OpenTelemetry semantic conventions, GenAI (`gen_ai.token.type` with "input" and "output", `gen_ai.usage.input_tokens`,
  `gen_ai.usage.output_tokens`; `gen_ai.usage.cache_read.input_tokens` and `gen_ai.usage.cache_creation.input_tokens`,
  both part of the input; `gen_ai.response.model`; all of them in development)
- OpenAI's API reference (`usage` of chat completions and of responses: cached tokens are part of the input, those of
  reasoning part of the output)
- Anthropic's API reference (`usage` of messages: cached tokens stand beside the input)
- Google's Gemini API reference, UsageMetadata (`usage_metadata` of GenerateContentResponse, camelCase in REST: cached
  tokens are part of the prompt's; thoughts stand beside the candidates, tool results beside the prompt, for the total
  is the sum of these four; in a stream each item has the totals so far and the same `response_id`)
- Amazon Bedrock's API reference, TokenUsage (`usage` of Converse, and in the event `metadata` of ConverseStream), and
  its user guide on prompt caching: cached tokens stand beside `inputTokens`; boto3's `ResponseMetadata.RequestId` tells
  answers apart, and the event of a stream, which comes once in it, names none
- Google's Live API reference, UsageMetadata (`responseTokenCount` in the place of the candidates'): refused, for it
  is not known which messages of a session repeat the tokens of others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tallymark.dimensions import MAX_VALUE_LENGTH, Value, is_text

TOKEN_UNIT: Final = "{token}"  # noqa: S105 - of a model, no secret
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105
MODEL: Final = "gen_ai.response.model"

MAX_MODELS: Final = 100
"""Models that one call may use; the tokens of further ones name none."""

_MISSING: Final = object()

# What a usage object calls an amount, the first that is there. `part_`: in the input; `beside_`: not in the input, or
# the output.
_NAMES: Final = {
    "input": (
        "input_tokens",
        "prompt_tokens",
        "prompt_token_count",
        "promptTokenCount",
        "inputTokens",
        "gen_ai.usage.input_tokens",
    ),
    "output": (
        "output_tokens",
        "completion_tokens",
        "candidates_token_count",
        "candidatesTokenCount",
        "outputTokens",
        "gen_ai.usage.output_tokens",
    ),
    "beside_input": ("tool_use_prompt_token_count", "toolUsePromptTokenCount"),
    "beside_output": ("thoughts_token_count", "thoughtsTokenCount"),
    "beside_read": ("cache_read_input_tokens", "cacheReadInputTokens"),
    "beside_creation": ("cache_creation_input_tokens", "cacheWriteInputTokens"),
    "part_read": ("cached_content_token_count", "cachedContentTokenCount", "gen_ai.usage.cache_read.input_tokens"),
    "part_creation": ("gen_ai.usage.cache_creation.input_tokens",),
}
_NAMES_IN_DETAILS: Final = {
    "part_read": ("cached_tokens",),
    "part_creation": ("cache_write_tokens", "cache_creation_tokens"),
}
_DETAILS: Final = ("input_tokens_details", "prompt_tokens_details")

# What is not under `usage` must have one of these names to be taken for it. Other libraries put other things there:
# LangChain's `usage_metadata` keeps what is cached in details of its own.
_GEMINI: Final = ("prompt_token_count", "promptTokenCount", "candidates_token_count", "candidatesTokenCount")
_GEMINI_LIVE: Final = ("response_token_count", "responseTokenCount")
_BEDROCK: Final = ("inputTokens", "outputTokens")
_CONVENTIONS: Final = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")

_MODELS: Final = ("model", "model_version", "modelVersion", MODEL)
_ANSWERS: Final = ("id", "response_id", "responseId", "gen_ai.response.id")


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What one answer, or one item of a streamed one, says. `stated` holds amounts by the names above, `answer` is the
    answer's identifier. With `is_whole` it says all of an answer, and whatever else comes is another one's."""

    stated: Mapping[str, int]
    model: str | None
    answer: str | None
    is_whole: bool = False

    def is_of_one_answer(self, later: TokenUsage) -> bool:
        """Whether a later item goes on with the answer of this one: it does unless something tells them apart."""
        if self.is_whole or later.is_whole:
            return False
        return self.answer is None or later.answer is None or self.answer == later.answer

    def and_later(self, later: TokenUsage) -> TokenUsage:
        """With what a later item of the same answer says: totals that grow, of which an item may carry a part."""
        names = {**self.stated, **later.stated}
        stated = {name: max(self.stated.get(name, 0), later.stated.get(name, 0)) for name in names}
        return TokenUsage(stated, later.model or self.model, later.answer or self.answer)

    def by_type(self) -> dict[str, int]:
        """Tokens by `gen_ai.token.type`, each under one type alone. Raises ValueError for amounts that cannot be."""
        stated = self.stated
        given = stated.get("input", 0)
        read, made = stated.get("part_read", 0), stated.get("part_creation", 0)
        if "part_read" in stated or "part_creation" in stated or "chat" in stated:
            # Gateways that speak OpenAI's language for other models name the same tokens in Anthropic's way as well.
            read = max(read, stated.get("beside_read", 0))
            made = max(made, stated.get("beside_creation", 0))
            if read + made > given:
                raise ValueError(f"{read + made} cached tokens are more than the {given} of the input they are part of")
            given -= read + made
        else:
            read, made = stated.get("beside_read", 0), stated.get("beside_creation", 0)
        return {
            "input": given + stated.get("beside_input", 0),
            "output": stated.get("output", 0) + stated.get("beside_output", 0),
            "cache_read": read,
            "cache_creation": made,
        }


class Tokens:
    """The tokens of a call: of one answer, or of all those that it streams one after the other. Not thread-safe."""

    __slots__ = ("_latest", "_sums")

    def __init__(self) -> None:
        self._latest: TokenUsage | None = None
        self._sums: dict[tuple[str | None, str], int] = {}

    def and_of(self, found: TokenUsage) -> Tokens:
        """Itself, with what an item says, of the same answer or of the next one."""
        latest = self._latest
        if latest is None:
            self._latest = found
        elif latest.is_of_one_answer(found):
            self._latest = latest.and_later(found)
        else:
            self._sums = self._with_latest()
            self._latest = found
        return self

    def amounts(self) -> list[tuple[int, Mapping[str, Value]]]:
        """The amounts with their attributes. Raises ValueError for amounts that cannot be."""
        return [
            (count, {TOKEN_TYPE: kind} if model is None else {TOKEN_TYPE: kind, MODEL: model})
            for (model, kind), count in self._with_latest().items()
        ]

    def _with_latest(self) -> dict[tuple[str | None, str], int]:
        sums = dict(self._sums)
        if self._latest is not None:
            model = self._latest.model
            if len({named for named, _ in sums} | {model}) > MAX_MODELS:
                model = None
            for kind, count in self._latest.by_type().items():
                if count:
                    sums[model, kind] = sums.get((model, kind), 0) + count
        return sums


def find_usage(answer: object, usage_of: Callable[[Any], object] | None = None) -> TokenUsage | None:
    """What an answer, or an item of a streamed one, says of its tokens; None where it says nothing.

    Raises whatever `usage_of` raises, and ValueError for amounts that cannot be.
    """
    if answer is None:
        return None
    about, is_whole = answer, False
    usage = usage_of(answer) if usage_of is not None else _usage_in(answer)
    if usage is None and usage_of is None:
        # The last event of a streamed answer carries the whole of it; Anthropic's first one the message begun.
        for inner in (_get(answer, "response"), _get(answer, "message")):
            if inner is not None and (usage := _usage_in(inner)) is not None:
                about = inner
                break
        else:
            usage = _if_it_has(_BEDROCK, _get(_get(answer, "metadata"), "usage"))
            is_whole = True
    stated = None if usage is None else _stated(usage)
    if stated is None:
        return None
    identifier = _text(about, *_ANSWERS) or _text(_get(about, "ResponseMetadata"), "RequestId")
    return TokenUsage(stated, _text(about, *_MODELS) or _text(usage, MODEL), identifier, is_whole)


def _usage_in(answer: object) -> object:
    found = _get(answer, "usage")
    for name in ("usage_metadata", "usageMetadata"):
        if found is None:
            found = _if_it_has(_GEMINI + _GEMINI_LIVE, _get(answer, name))
    return _if_it_has(_CONVENTIONS, answer) if found is None and isinstance(answer, Mapping) else found


def _if_it_has(names: tuple[str, ...], usage: object) -> object:
    return usage if any(_get(usage, name) is not None for name in names) else None


def _stated(usage: object) -> dict[str, int] | None:
    for name in _GEMINI_LIVE:
        if _get(usage, name) is not None:
            raise ValueError(
                f"{name} is of Gemini Live, whose usage is not read: usage_of= may give one answer's as input_tokens "
                "and output_tokens, tallymark.record() counts several"
            )
    stated = _counts(usage, _NAMES)
    if "input" not in stated and "output" not in stated:
        return None
    for name in _DETAILS:
        details = _get(usage, name)
        if details is not None:
            stated.update(_counts(details, _NAMES_IN_DETAILS))
    if _get(usage, "prompt_tokens") is not None:
        stated["chat"] = 1  # OpenAI's older names: whatever is cached is part of the input
    return stated


def _counts(usage: object, names: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    found = {kind: _count(usage, *spellings) for kind, spellings in names.items()}
    return {kind: count for kind, count in found.items() if count is not None}


def _count(usage: object, *names: str) -> int | None:
    for name in names:
        value = _get(usage, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is no number of tokens, but a {type(value).__name__}")
        return value
    return None


def _text(thing: object, *names: str) -> str | None:
    for name in names:
        value = _get(thing, name)
        if isinstance(value, str) and 0 < len(value) <= MAX_VALUE_LENGTH and is_text(value):
            return value
    return None


def _get(thing: object, name: str) -> object:
    if isinstance(thing, Mapping):
        return thing.get(name)
    value = getattr(thing, name, _MISSING)
    return None if value is _MISSING or callable(value) else value
