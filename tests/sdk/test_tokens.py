"""Tokens of language models: each is counted once, under one type, however the answer tells of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace as Object
from typing import Any

import pytest

from tallymark import identify, track_usage
from tallymark.assembly import Runtime
from tallymark.measure import tokens
from tallymark.testing import Captured, capture_usage


@pytest.fixture(autouse=True)
def _own_meters(fresh: Runtime) -> None:
    identify(account="acme")


def objects(thing: Any) -> Any:
    """The same as objects with attributes, as the clients' libraries have them."""
    if isinstance(thing, dict):
        return Object(**{name: objects(value) for name, value in thing.items()})
    return thing


def counted(usage: Captured) -> dict[object, object]:
    assert all(u.unit == "{token}" for u in usage)
    return {u.attributes["gen_ai.token.type"]: u.quantity for u in usage}


CHAT = {
    "id": "chatcmpl-1",
    "model": "gpt-x",
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 5},
    },
}
RESPONSES = {
    "id": "resp_1",
    "model": "gpt-x",
    "usage": {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 30},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 120,
    },
}
MESSAGES = {
    "id": "msg_1",
    "model": "claude-x",
    "usage": {
        "input_tokens": 70,
        "output_tokens": 20,
        "cache_read_input_tokens": 30,
        "cache_creation_input_tokens": 7,
    },
}
# A gateway that tells the same tokens in both languages.
BOTH = {
    "model": "claude-x",
    "usage": {
        "prompt_tokens": 107,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 30},
        "cache_read_input_tokens": 30,
        "cache_creation_input_tokens": 7,
    },
}
# The prompt's count has the cached tokens in it; thoughts stand beside the candidates, tool results beside the prompt.
GEMINI = {
    "response_id": "r1",
    "model_version": "gemini-x",
    "usage_metadata": {
        "prompt_token_count": 100,
        "candidates_token_count": 15,
        "cached_content_token_count": 30,
        "thoughts_token_count": 5,
        "tool_use_prompt_token_count": None,
        "total_token_count": 120,
    },
}
GEMINI_REST = {
    "responseId": "r1",
    "modelVersion": "gemini-x",
    "usageMetadata": {
        "promptTokenCount": 98,
        "toolUsePromptTokenCount": 2,
        "candidatesTokenCount": 15,
        "cachedContentTokenCount": 30,
        "thoughtsTokenCount": 5,
        "totalTokenCount": 120,
    },
}
BEDROCK = {
    "output": {"message": {"role": "assistant", "content": [{"text": "…"}]}},
    "usage": {
        "inputTokens": 70,
        "outputTokens": 20,
        "totalTokens": 127,
        "cacheReadInputTokens": 30,
        "cacheWriteInputTokens": 7,
    },
}
# A span's attributes: what is cached is in the input, and thoughts are in the output.
CONVENTIONS = {
    "gen_ai.request.model": "asked-for",
    "gen_ai.response.model": "conv-x",
    "gen_ai.response.id": "c1",
    "gen_ai.usage.input_tokens": 107,
    "gen_ai.usage.output_tokens": 20,
    "gen_ai.usage.reasoning.output_tokens": 5,
    "gen_ai.usage.cache_read.input_tokens": 30,
    "gen_ai.usage.cache_creation.input_tokens": 7,
}
EMBEDDINGS = {"model": "text-x", "usage": {"prompt_tokens": 8, "total_tokens": 8}}

OPENAI = {"input": 70, "output": 20, "cache_read": 30}
ANTHROPIC = {"input": 70, "output": 20, "cache_read": 30, "cache_creation": 7}


@pytest.mark.parametrize("form", [dict, objects])
@pytest.mark.parametrize(
    ("answer", "want"),
    [(CHAT, OPENAI), (RESPONSES, OPENAI), (MESSAGES, ANTHROPIC), (BOTH, ANTHROPIC), (EMBEDDINGS, {"input": 8})],
)
def test_an_answer(form: Any, answer: dict[str, Any], want: dict[str, int]) -> None:
    @track_usage("llm.tokens", tokens())
    def complete() -> Any:
        return form(answer)

    with capture_usage() as usage:
        complete()
    assert counted(usage) == want
    assert {u.attributes["gen_ai.response.model"] for u in usage} == {answer["model"]}
    assert usage.refused() == {}


OTHERS: list[tuple[dict[str, Any], dict[str, int], str | None]] = [
    (GEMINI, OPENAI, "gemini-x"),
    (GEMINI_REST, OPENAI, "gemini-x"),
    ({"response": GEMINI_REST}, OPENAI, "gemini-x"),
    ({"usage_metadata": {"prompt_token_count": 9}}, {"input": 9}, None),  # a prompt that was blocked
    (BEDROCK, ANTHROPIC, None),
    ({"usage": {"inputTokens": 1, "outputTokens": 2}}, {"input": 1, "output": 2}, None),
    ({"usage": CONVENTIONS}, ANTHROPIC, "conv-x"),
    ({"model": "m", "usage": CONVENTIONS}, ANTHROPIC, "m"),
]
MAPPINGS: list[tuple[dict[str, Any], dict[str, int], str | None]] = [
    (CONVENTIONS, ANTHROPIC, "conv-x"),
    ({"gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 6}, {"input": 5, "output": 6}, None),
    ({"gen_ai.usage.output_tokens": 6}, {"output": 6}, None),
]


@pytest.mark.parametrize(
    ("form", "answer", "want", "model"),
    [(form, *other) for form in (dict, objects) for other in OTHERS] + [(dict, *mapping) for mapping in MAPPINGS],
)
def test_an_answer_in_other_words(form: Any, answer: dict[str, Any], want: dict[str, int], model: str | None) -> None:
    complete = track_usage("llm.tokens", tokens())(lambda: form(answer))
    with capture_usage() as usage:
        complete()
    assert (counted(usage), usage.refused()) == (want, {})
    assert {u.attributes.get("gen_ai.response.model") for u in usage} == {model}


@pytest.mark.parametrize(
    "usage_of", [lambda a: a["usage_metadata"], lambda a: Object(**a["usage_metadata"])], ids=["mapping", "object"]
)
def test_a_vendors_usage_that_was_found_for_it(usage_of: Any) -> None:
    @track_usage("llm.tokens", tokens(usage_of))
    def complete() -> Any:
        return GEMINI

    with capture_usage() as usage:
        complete()
    assert counted(usage) == OPENAI


def chunk(usage: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "model": "gpt-x", "choices": [], "usage": usage, **more}


STREAMS: dict[str, tuple[list[dict[str, Any]], dict[str, int]]] = {
    "chat, usage in the last": ([chunk(), chunk(), chunk(CHAT["usage"])], OPENAI),
    "chat, usage in each, details in the last": (
        [chunk({"prompt_tokens": 100, "completion_tokens": n}) for n in (1, 10)] + [chunk(CHAT["usage"])],
        OPENAI,
    ),
    "responses": (
        [
            {"type": "response.created", "response": {"id": "resp_1", "usage": None}},
            {"type": "response.output_text.delta", "delta": "…"},
            {"type": "response.completed", "response": RESPONSES},
        ],
        OPENAI,
    ),
    "messages": (
        [
            {"type": "message_start", "message": {**MESSAGES, "usage": {**MESSAGES["usage"], "output_tokens": 1}}},  # type: ignore[dict-item]
            {"type": "content_block_delta", "delta": {"text": "…"}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
            {"type": "message_stop"},
        ],
        ANTHROPIC,
    ),
    "messages, the input told as 0 first": (
        [
            {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 0, "output_tokens": 0}}},
            {"type": "message_delta", "usage": MESSAGES["usage"]},
        ],
        ANTHROPIC,
    ),
    "gemini, running totals in each": (
        [
            {**GEMINI, "usage_metadata": None},
            {**GEMINI, "usage_metadata": {"prompt_token_count": 100, "thoughts_token_count": 5}},
            {**GEMINI, "usage_metadata": {"prompt_token_count": 100, "candidates_token_count": 4}},
            GEMINI,
        ],
        OPENAI,
    ),
    "gemini, two answers": (
        [GEMINI, {**GEMINI, "response_id": "r2"}],
        {kind: 2 * count for kind, count in OPENAI.items()},
    ),
    "bedrock": (
        [
            {"messageStart": {"role": "assistant"}},
            {"contentBlockDelta": {"delta": {"text": "…"}, "contentBlockIndex": 0}},
            {"messageStop": {"stopReason": "end_turn"}},
            {"metadata": {"usage": BEDROCK["usage"], "metrics": {"latencyMs": 1}}},
        ],
        ANTHROPIC,
    ),
    "bedrock, two answers": (
        [
            {"messageStart": {"role": "assistant"}},
            {"metadata": {"usage": {"inputTokens": 100, "outputTokens": 10}, "metrics": {"latencyMs": 1}}},
            {"messageStart": {"role": "assistant"}},
            {"metadata": {"usage": {"inputTokens": 80, "outputTokens": 20}, "metrics": {"latencyMs": 1}}},
        ],
        {"input": 180, "output": 30},
    ),
    "bedrock, two whole answers": (
        [
            {"ResponseMetadata": {"RequestId": "r1"}, "usage": {"inputTokens": 100, "outputTokens": 10}},
            {"ResponseMetadata": {"RequestId": "r2"}, "usage": {"inputTokens": 80, "outputTokens": 20}},
            {"ResponseMetadata": {"RequestId": "r2"}, "usage": {"inputTokens": 80, "outputTokens": 20}},
        ],
        {"input": 180, "output": 30},
    ),
    "a stream of bedrock's after one of another's": (
        [chunk(CHAT["usage"]), {"metadata": {"usage": BEDROCK["usage"]}}, {"usage": {"output_tokens": 1}}],
        {"input": 140, "output": 41, "cache_read": 60, "cache_creation": 7},
    ),
    "two answers one after the other": (
        [chunk(CHAT["usage"]), chunk(id="chatcmpl-2"), chunk(CHAT["usage"], id="chatcmpl-2")],
        {kind: 2 * count for kind, count in OPENAI.items()},
    ),
    "two messages one after the other": (
        [
            {"type": "message_start", "message": MESSAGES},
            {"type": "message_delta", "usage": {"output_tokens": 25}},
            {"type": "message_start", "message": {**MESSAGES, "id": "msg_2"}},
            {"type": "message_delta", "usage": {"output_tokens": 30}},
        ],
        {"input": 140, "output": 55, "cache_read": 60, "cache_creation": 14},
    ),
}


@pytest.mark.parametrize("form", [dict, objects])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream(form: Any, name: str) -> None:
    items, want = STREAMS[name]

    @track_usage("llm.tokens", tokens())
    async def stream() -> AsyncIterator[Any]:
        for item in items:
            yield form(item)

    @track_usage("llm.tokens", tokens())
    def generator() -> Iterator[Any]:
        for item in items:
            yield form(item)

    with capture_usage() as usage:
        assert len([item async for item in stream()]) == len(items)
        assert counted_by_type(usage) == want
    with capture_usage() as usage:
        list(generator())
    assert counted_by_type(usage) == want
    assert usage.refused() == {}


def counted_by_type(usage: Captured) -> dict[object, object]:
    found: dict[object, Any] = {}
    for one in usage:
        kind = one.attributes["gen_ai.token.type"]
        found[kind] = found.get(kind, 0) + one.quantity
    return found


def test_models_of_one_stream_are_told_apart() -> None:
    @track_usage("llm.tokens", tokens())
    def stream() -> Iterator[Any]:
        yield chunk({"prompt_tokens": 1, "completion_tokens": 2})
        yield chunk({"prompt_tokens": 10, "completion_tokens": 20}, id="2", model="other")

    with capture_usage() as usage:
        list(stream())
    assert {(u.attributes["gen_ai.response.model"], u.attributes["gen_ai.token.type"]): u.quantity for u in usage} == {
        ("gpt-x", "input"): 1,
        ("gpt-x", "output"): 2,
        ("other", "input"): 10,
        ("other", "output"): 20,
    }


class Raises:
    @property
    def usage(self) -> object:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "text",
        {},
        {"usage": None},
        {"usage": {"total_tokens": 3}},
        {"usage": {"input_tokens": "3"}},
        {"usage": {"input_tokens": 3.0}},
        {"usage": {"input_tokens": -1}},
        {"usage": {"input_tokens": True}},
        {"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}},
        {"usage": {"prompt_tokens": 3, "cache_read_input_tokens": 4}},
        {"usage": 7},
        {"usage_metadata": {"total_token_count": 3}},
        {"usage_metadata": {"prompt_token_count": 3, "cached_content_token_count": 4}},
        {"usage_metadata": {"prompt_token_count": 3, "thoughts_token_count": 1.5}},
        {"usage_metadata": {"input_tokens": 3, "output_tokens": 4}},  # LangChain's: whose details are its own
        {"usage_metadata": {"prompt_token_count": 3, "response_token_count": 4}},  # Gemini Live's
        {"usageMetadata": {"promptTokenCount": 3, "responseTokenCount": 0}},
        {"usageMetadata": {"responseTokenCount": 4}},
        {"usage": {"inputTokens": -1}},
        {"metadata": {"usage": "much"}},
        {"metadata": {"usage": {"input_tokens": 3}}},  # whatever somebody has put there
        {"gen_ai.usage.input_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 4},
        {"gen_ai.usage.input_tokens": "3"},
        {"gen_ai.request.model": "m"},
        Raises(),
    ],
)
def test_what_cannot_be_counted_is_refused_aloud(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    @track_usage("llm.tokens", tokens())
    def complete() -> object:
        return answer

    with capture_usage() as usage:
        assert complete() is answer
    assert (list(usage), usage.refused()) == ([], {"llm.tokens": 1})
    assert "not billed" in caplog.text


def test_zero_tokens_are_an_answer() -> None:
    @track_usage("llm.tokens", tokens())
    def complete() -> object:
        return {"usage": {"input_tokens": 0, "output_tokens": 0}}

    with capture_usage() as usage:
        complete()
    assert (list(usage), usage.refused()) == ([], {})


def test_a_call_without_an_answer_counts_nothing_but_a_broken_stream_is_refused() -> None:
    @track_usage("llm.tokens", tokens())
    def complete() -> object:
        raise TimeoutError

    @track_usage("llm.tokens", tokens())
    def stream(items: list[Any]) -> Iterator[Any]:
        yield from items

    with capture_usage() as usage:
        with pytest.raises(TimeoutError):
            complete()
        assert usage.refused() == {}
        broken = stream([{"delta": "a"}, chunk(CHAT["usage"])])
        next(broken)
        broken.close()  # type: ignore[attr-defined]
        assert usage.refused() == {"llm.tokens": 1}
        begun = stream([{"type": "message_start", "message": MESSAGES}, {}])
        next(begun)
        begun.close()  # type: ignore[attr-defined]
    assert counted(usage) == ANTHROPIC  # as far as it was told
    assert {u.attributes["error.type"] for u in usage} == {"GeneratorExit"}


def test_an_item_that_cannot_be_read_is_refused_and_the_others_count() -> None:
    @track_usage("llm.tokens", tokens())
    def stream() -> Iterator[Any]:
        yield {"usage": {"input_tokens": 5}}
        yield {"usage": {"input_tokens": "many"}}
        yield Raises()
        yield {"usage": {"output_tokens": 6}}

    with capture_usage() as usage:
        assert len(list(stream())) == 4
    assert counted(usage) == {"input": 5, "output": 6}
    assert usage.refused() == {"llm.tokens": 2}


LIVE = {"promptTokenCount": 10, "responseTokenCount": 500, "totalTokenCount": 510}


@pytest.mark.parametrize("usage_of", [None, lambda item: item["usageMetadata"]], ids=["", "usage_of"])
def test_the_usage_of_gemini_live_is_refused_until_it_is_told_in_names_that_are_known(
    usage_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def known(item: Any) -> dict[str, int]:
        found = item["usageMetadata"]
        return {"input_tokens": found["promptTokenCount"], "output_tokens": found["responseTokenCount"]}

    def stream() -> Iterator[Any]:
        yield {"usageMetadata": LIVE}

    with capture_usage() as usage:
        list(track_usage("llm.tokens", tokens(usage_of))(stream)())
        assert list(usage) == []
        assert usage.refused()["llm.tokens"] >= 1
        assert "responseTokenCount is of Gemini Live" in caplog.text
        list(track_usage("llm.tokens", tokens(known))(stream)())
    assert counted(usage) == {"input": 10, "output": 500}


def test_usage_that_stands_elsewhere() -> None:
    @track_usage("llm.tokens", tokens(lambda answer: answer["meta"]["billed"]))
    def complete() -> object:
        return {"meta": {"billed": {"input_tokens": 3, "output_tokens": 4}}}

    with capture_usage() as usage:
        complete()
    assert counted(usage) == {"input": 3, "output": 4}


def test_a_model_that_cannot_be_a_dimension_is_left_out() -> None:
    @track_usage("llm.tokens", tokens())
    def complete(model: object) -> object:
        return {"model": model, "usage": {"input_tokens": 1}}

    with capture_usage() as usage:
        for model in (None, 7, "", "x" * 2000, "a\0b", "\ud800"):
            complete(model)
    assert usage.total("llm.tokens") == 6
    assert not [u for u in usage if "gen_ai.response.model" in u.attributes]
