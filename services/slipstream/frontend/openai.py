"""OpenAI's request and response bodies, as far as they are served."""

from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

# --- Requests -------------------------------------------------------------------------------------
# Types alone are checked here, strictly; ranges are checked by `validate`, which can say more.
# Unknown members are ignored, as are those that change no token: user, metadata, store, ...


class Unserved(msgspec.Struct, kw_only=True):
    """Members that would change the answer and are not served: anything but a neutral value (see
    `validate.NEUTRAL`) is refused by name, never ignored."""

    audio: Any = None
    best_of: Any = None
    chat_template: Any = None
    detokenize: Any = None
    documents: Any = None
    flat_logprobs: Any = None
    function_call: Any = None
    functions: Any = None
    guided_choice: Any = None
    guided_decoding_backend: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_whitespace_pattern: Any = None
    include_reasoning: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    modalities: Any = None
    prediction: Any = None
    prompt_embeds: Any = None
    reasoning_effort: Any = None
    repetition_detection: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    suffix: Any = None
    thinking_token_budget: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    verbosity: Any = None
    vllm_xargs: Any = None
    web_search_options: Any = None


class UnservedChat(Unserved, kw_only=True):
    """What completions serve, and chats do not."""

    add_special_tokens: Any = None
    echo: Any = None


class UnservedCompletion(Unserved, kw_only=True):
    """What chats serve, and completions do not."""

    max_completion_tokens: Any = None


class UnservedElsewhere(UnservedChat, kw_only=True):
    """The same on the paths of other APIs, with what a chat serves and those paths have in words of
    their own, or not at all (see `NEUTRAL_ELSEWHERE`)."""

    add_generation_prompt: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    continue_final_message: Any = None
    ignore_eos: Any = None
    include_stop_str_in_output: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    max_completion_tokens: Any = None
    min_tokens: Any = None
    n: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    skip_special_tokens: Any = None
    stop_token_ids: Any = None
    structured_outputs: Any = None


NEUTRAL_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
}

PASSED_ELSEWHERE = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "timeout", "cache_salt", "priority", "chat_template_kwargs"),
    "stream",
)
"""Members of a chat that other APIs have, or are served, under the same name."""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generate(Unserved, kw_only=True):
    """What chat and completions have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    priority: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class ChatRequest(Generate, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    """A word, or an object that names one."""
    parallel_tool_calls: bool | None = None
    # Of `UnservedChat`.
    add_special_tokens: Any = None
    echo: Any = None


class CompletionRequest(Generate, kw_only=True):
    prompt: Any
    """Text, texts, token ids, or several of these; msgspec has no such union."""
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    # Of `UnservedCompletion`.
    max_completion_tokens: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


# --- Responses ------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int


class UsageOut(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobOut(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprobOut]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    """None of a prompt's first token: nothing comes before it."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, kw_only=True):
    logprob: float
    decoded_token: str


PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]
"""By token id, for each token of the prompt: itself, and alternatives; as vLLM has it."""


StopReason: TypeAlias = str | int | None


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallOut(msgspec.Struct, kw_only=True):
    index: int | UnsetType = UNSET
    """In a stream."""
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The same text under both names: clients read one of them."""
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: StopReason | UnsetType = UNSET


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: StopReason = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: StopReason | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class _Reply(msgspec.Struct, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class ChatChunk(_Reply, kw_only=True):
    choices: list[ChatChunkChoice]
    usage: UsageOut | UnsetType = UNSET


class ChatReply(_Reply, kw_only=True):
    choices: list[ChatChoice]
    usage: UsageOut
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionChunk(_Reply, kw_only=True):
    choices: list[CompletionChoice]
    usage: UsageOut | UnsetType = UNSET


class CompletionReply(_Reply, kw_only=True):
    choices: list[CompletionChoice]
    usage: UsageOut


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "slipstream"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[str] = []


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct, kw_only=True):
    prompt: str
