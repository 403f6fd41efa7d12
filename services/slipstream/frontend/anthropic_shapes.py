"""Bodies of Anthropic's Messages API, as far as it is served."""

from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from slipstream.frontend.openai import NEUTRAL_ELSEWHERE, UnservedElsewhere
from slipstream.frontend.validate import NEUTRAL

# --- Requests -------------------------------------------------------------------------------------


class UnservedMessages(UnservedElsewhere, kw_only=True):
    """Members that would change the answer and are not served (see `NEUTRAL_MESSAGES`)."""

    container: Any = None
    mcp_servers: Any = None
    parallel_tool_calls: Any = None
    stop: Any = None
    top_logprobs: Any = None


NEUTRAL_MESSAGES: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    **NEUTRAL_ELSEWHERE,
    "mcp_servers": ([],),
    "parallel_tool_calls": (True,),
    "stop": ([],),
    "top_logprobs": (0,),
}

IGNORED_MESSAGES = {
    "cache_control": "prefixes are cached without it",
    "context_management": "a conversation that is too long is refused, not cut",
    "diagnostics": "nothing more is told",
    "inference_geo": "there is one place",
    "metadata": "nobody looks at it",
    "service_tier": "there is one",
    "speed": "there is one",
    "thinking": "a model that reasons does so as its template says",
    "user_profile_id": "nobody looks at it",
    "workspace_id": "nobody looks at it",
}
"""Members of Anthropic's that change no token here."""


class OutputConfig(msgspec.Struct, kw_only=True):
    effort: str | None = None
    """Is not looked at."""
    format: dict[str, Any] | None = None


class _Conversation(UnservedMessages, kw_only=True):
    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(_Conversation, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    # Beyond Anthropic's, as of chat completions.
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountTokensRequest(_Conversation, kw_only=True):
    chat_template_kwargs: dict[str, Any] | None = None


# --- Answers --------------------------------------------------------------------------------------


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""
    """Of nobody: what comes back is taken as it is."""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any] = {}


ContentBlock: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(msgspec.Struct, kw_only=True):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """The prompt is what was computed and what was found, together."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int
    output_tokens_details: ThinkingTokens | UnsetType = UNSET


class MessageReply(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: str = "assistant"
    model: str
    content: list[ContentBlock] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokensCount(msgspec.Struct, kw_only=True):
    input_tokens: int


class AnthropicError(msgspec.Struct, kw_only=True):
    type: str
    message: str


class AnthropicErrorReply(msgspec.Struct, kw_only=True, tag_field="type", tag="error"):
    error: AnthropicError
    request_id: str | None = None


# --- Events of a stream ---------------------------------------------------------------------------


class MessageStart(msgspec.Struct, kw_only=True, tag_field="type", tag="message_start"):
    message: MessageReply


class Ping(msgspec.Struct, kw_only=True, tag_field="type", tag="ping"):
    pass


class BlockStart(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: ContentBlock


class TextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct, kw_only=True):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(msgspec.Struct, kw_only=True, tag_field="type", tag="message_stop"):
    pass


StreamEvent: TypeAlias = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
    | AnthropicErrorReply
)  # fmt: skip
