"""Bodies of the Responses API, as far as it is served."""

from typing import Any, TypeAlias

import msgspec

from slipstream.frontend.openai import NEUTRAL_ELSEWHERE, PASSED_ELSEWHERE, UnservedElsewhere
from slipstream.frontend.validate import NEUTRAL

# --- Requests -------------------------------------------------------------------------------------


class UnservedResponses(UnservedElsewhere, kw_only=True):
    """Members that would change the answer and are not served (see `NEUTRAL_RESPONSES`)."""

    background: Any = None
    context_management: Any = None
    conversation: Any = None
    max_tokens: Any = None
    moderation: Any = None
    prompt: Any = None


NEUTRAL_RESPONSES: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    **NEUTRAL_ELSEWHERE,
    "background": (False,),
    "context_management": ([],),
}

IGNORED_RESPONSES = {
    "access_programs": "there are none",
    "background_options": "`background` is refused",
    "image": "images are refused",
    "metadata": "goes back as it came",
    "max_tool_calls": "counts calls of hosted tools, of which there are none",
    "prompt_cache_key": "prefixes are found without it",
    "prompt_cache_options": "prefixes are cached without it",
    "prompt_cache_retention": "prefixes are cached while there is room",
    "reasoning": "goes back as it came; a model that reasons does so as its template says",
    "safety_identifier": "nobody looks at it",
    "service_tier": "there is one",
    "stream_options": "nothing is obfuscated",
    "truncation": "a conversation that is too long is refused, not cut",
    "user": "goes back as it came",
}
"""Members of OpenAI's that change no token here."""


class TextConfig(msgspec.Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None
    """Goes back as it came."""


class ReasoningConfig(msgspec.Struct, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(UnservedResponses, kw_only=True):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    # Beyond OpenAI's, as of chat completions.
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


PASSED = (*PASSED_ELSEWHERE, "stop")
"""Members that a chat has under the same name."""


class InputTokensRequest(UnservedResponses, kw_only=True):
    """What the tokens are counted of; the rest of a request is not looked at."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# --- Answers --------------------------------------------------------------------------------------


class TopLogprobOut(msgspec.Struct, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float


class LogprobOut(TopLogprobOut, kw_only=True):
    top_logprobs: list[TopLogprobOut]


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[None] = []
    logprobs: list[LogprobOut] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText] = []


class CallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    status: str
    call_id: str
    name: str
    arguments: str = ""


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: str
    summary: list[None] = []
    content: list[ReasoningText] = []
    encrypted_content: None = None


Item: TypeAlias = MessageItem | CallItem | ReasoningItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: str


class ResponseBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str = "in_progress"
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    service_tier: str = "default"
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: str = "response.deleted"
    deleted: bool = True


class InputItemList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(msgspec.Struct, kw_only=True):
    object: str = "response.input_tokens"
    input_tokens: int


# --- Events of a stream ---------------------------------------------------------------------------


class Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0


class Created(Event, kw_only=True, tag="response.created"):
    response: ResponseBody


class InProgress(Event, kw_only=True, tag="response.in_progress"):
    response: ResponseBody


class Completed(Event, kw_only=True, tag="response.completed"):
    response: ResponseBody


class Incomplete(Event, kw_only=True, tag="response.incomplete"):
    response: ResponseBody


class Failed(Event, kw_only=True, tag="response.failed"):
    response: ResponseBody


class ItemAdded(Event, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: Item


class ItemDone(Event, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: Item


class _InItem(Event, kw_only=True):
    item_id: str
    output_index: int


class PartAdded(_InItem, kw_only=True, tag="response.content_part.added"):
    content_index: int = 0
    part: OutputText | ReasoningText


class PartDone(_InItem, kw_only=True, tag="response.content_part.done"):
    content_index: int = 0
    part: OutputText | ReasoningText


class TextGrew(_InItem, kw_only=True, tag="response.output_text.delta"):
    content_index: int = 0
    delta: str
    logprobs: list[LogprobOut] = []


class TextDone(_InItem, kw_only=True, tag="response.output_text.done"):
    content_index: int = 0
    text: str
    logprobs: list[LogprobOut] = []


class ReasoningGrew(_InItem, kw_only=True, tag="response.reasoning_text.delta"):
    content_index: int = 0
    delta: str


class ReasoningDone(_InItem, kw_only=True, tag="response.reasoning_text.done"):
    content_index: int = 0
    text: str


class ArgumentsGrew(_InItem, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(_InItem, kw_only=True, tag="response.function_call_arguments.done"):
    arguments: str


class Broken(Event, kw_only=True, tag="error"):
    """Before the first event of the response."""

    code: str
    message: str
    param: str | None


StreamEvent: TypeAlias = (
    Created | InProgress | Completed | Incomplete | Failed | ItemAdded | ItemDone | PartAdded
    | PartDone | TextGrew | TextDone | ReasoningGrew | ReasoningDone | ArgumentsGrew
    | ArgumentsDone | Broken
)  # fmt: skip
