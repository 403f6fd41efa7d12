"""What is served where, as data: the OpenAPI document and the page of compatibility are made of
it, and tests hold it against the routes and the answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from slipstream.errors import ErrorCode
from slipstream.frontend import adapters_api, anthropic_shapes, openai, responses_shapes
from slipstream.frontend.anthropic_input import MESSAGES_MAX
from slipstream.frontend.anthropic_shapes import CountTokensRequest, MessageReply, MessagesRequest
from slipstream.frontend.cluster import Cluster
from slipstream.frontend.info_shapes import Alive, Index, Readiness, Version
from slipstream.frontend.responses_input import ITEMS_MAX
from slipstream.frontend.responses_request import METADATA_MAX
from slipstream.frontend.responses_shapes import (
    InputItemList,
    InputTokens,
    InputTokensRequest,
    ResponseBody,
    ResponseDeleted,
    ResponsesRequest,
)
from slipstream.frontend.sampling import (
    ALLOWED_TOKENS_MAX,
    BAD_WORD_CHARS_MAX,
    BAD_WORDS_MAX,
    BIASES_MAX,
    STOP_CHARS_MAX,
    STOP_MAX,
    STOP_TOKENS_MAX,
)
from slipstream.frontend.tools_in import TOOLS_MAX
from slipstream.frontend.trace_api import TracesOut
from slipstream.frontend.usage_api import UsageList
from slipstream.frontend.validate import (
    LOGPROBS_MAX,
    NEUTRAL,
    SALT_CHARS_MAX,
    TIMEOUT_MAX_S,
    Limits,
)

# --- Bodies ---------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A request body, and what becomes of its members."""

    shape: type[Any]
    refused: type[Any] | None = None
    """Its members are, but for null and their `neutral` values."""
    neutral: Mapping[str, tuple[Any, ...]] = {}
    ignored: Mapping[str, str] = {}
    """Known, and changes no token -> why."""


IGNORED = {
    "metadata": "nobody looks at it",
    "moderation": "nothing is moderated",
    "prompt_cache_key": "prefixes are found without it",
    "prompt_cache_options": "prefixes are cached without it",
    "prompt_cache_retention": "prefixes are cached while there is room",
    "safety_identifier": "nobody looks at it",
    "service_tier": "there is one",
    "store": "nothing of a chat is kept",
    "user": "nobody looks at it",
}
CHAT = Body(openai.ChatRequest, openai.UnservedChat, NEUTRAL, IGNORED)
COMPLETION = Body(
    openai.CompletionRequest, openai.UnservedCompletion, NEUTRAL, {"user": IGNORED["user"]}
)
RESPONSES = Body(
    ResponsesRequest,
    responses_shapes.UnservedResponses,
    responses_shapes.NEUTRAL_RESPONSES,
    responses_shapes.IGNORED_RESPONSES,
)
INPUT_TOKENS = Body(InputTokensRequest, RESPONSES.refused, RESPONSES.neutral)
MESSAGES = Body(
    MessagesRequest,
    anthropic_shapes.UnservedMessages,
    anthropic_shapes.NEUTRAL_MESSAGES,
    anthropic_shapes.IGNORED_MESSAGES,
)
COUNT_TOKENS = Body(CountTokensRequest, MESSAGES.refused, MESSAGES.neutral, MESSAGES.ignored)


def limits(given: Limits) -> dict[str, dict[str, Any]]:
    """JSON Schema's words for what a member may be; of one body alone where it is named before the
    dot. Null is the same as nothing."""
    return {
        "n": {"minimum": 1, "maximum": given.max_choices},
        "max_tokens": {"minimum": 1},
        "CompletionRequest.max_tokens": {"minimum": 0},
        "max_completion_tokens": {"minimum": 1},
        "max_output_tokens": {"minimum": 1},
        "min_tokens": {"minimum": 0},
        "temperature": {"minimum": 0, "maximum": 2},
        "MessagesRequest.temperature": {"minimum": 0, "maximum": 1},
        "top_p": {"minimum": 0, "maximum": 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": 2**31 - 1},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
        "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
        "stop": {"maxItems": STOP_MAX, "minLength": 1, "maxLength": STOP_CHARS_MAX},
        "stop_sequences": {"maxItems": STOP_MAX},
        "stop_token_ids": {"maxItems": STOP_TOKENS_MAX},
        "top_logprobs": {"minimum": 0, "maximum": LOGPROBS_MAX},
        "CompletionRequest.logprobs": {"minimum": 0, "maximum": LOGPROBS_MAX},
        "prompt_logprobs": {"minimum": 0, "maximum": LOGPROBS_MAX},
        "logit_bias": {"maxProperties": BIASES_MAX},
        "allowed_token_ids": {"minItems": 1, "maxItems": ALLOWED_TOKENS_MAX},
        "bad_words": {
            "maxItems": BAD_WORDS_MAX,
            "minLength": 1,
            "maxLength": BAD_WORD_CHARS_MAX,
        },
        "priority": {"minimum": -(2**31), "maximum": 2**31 - 1},
        "ChatRequest.tools": {"minItems": 1, "maxItems": TOOLS_MAX},
        "TokenizeRequest.tools": {"minItems": 1, "maxItems": TOOLS_MAX},
        "timeout": {"exclusiveMinimum": 0, "maximum": TIMEOUT_MAX_S},
        "cache_salt": {"minLength": 1, "maxLength": SALT_CHARS_MAX, "pattern": r"^[^@/\\]*$"},
        "chat_template_kwargs": {"maxProperties": 32},
        "messages": {"minItems": 1, "maxItems": given.max_messages},
        "MessagesRequest.messages": {"minItems": 1, "maxItems": MESSAGES_MAX},
        "CountTokensRequest.messages": {"minItems": 1, "maxItems": MESSAGES_MAX},
        "prompt": {"minLength": 1, "minItems": 1},
        "TokenizeRequest.prompt": {},
        "input": {"minItems": 1, "maxItems": ITEMS_MAX},
        "ResponsesRequest.metadata": {"maxProperties": METADATA_MAX},
        "truncation": {"enum": ["auto", "disabled", None]},
    }


# --- Operations -----------------------------------------------------------------------------------

_OPEN = (ErrorCode.INTERNAL,)
_HTTP = (ErrorCode.UNAUTHORIZED, ErrorCode.INTERNAL)
_RANGES = (
    *(ErrorCode.INTEGER_BELOW, ErrorCode.INTEGER_ABOVE, ErrorCode.DECIMAL_BELOW),
    *(ErrorCode.DECIMAL_ABOVE, ErrorCode.STRING_BELOW, ErrorCode.STRING_ABOVE),
    *(ErrorCode.EMPTY_ARRAY, ErrorCode.ARRAY_ABOVE),
)
_BODY = (
    *_RANGES,
    *(ErrorCode.INVALID_JSON, ErrorCode.INVALID_TYPE, ErrorCode.INVALID_VALUE),
    *(ErrorCode.MISSING_PARAMETER, ErrorCode.UNSUPPORTED_PARAMETER, ErrorCode.TOO_LARGE),
    *(ErrorCode.UNSUPPORTED_CONTENT, ErrorCode.CONTEXT_LENGTH, ErrorCode.MODEL_NOT_FOUND),
    *(ErrorCode.UNSUPPORTED_MEDIA, ErrorCode.QUEUE_FULL, ErrorCode.NOT_READY),
    *(ErrorCode.DRAINING, ErrorCode.DEADLINE, ErrorCode.RATE_LIMIT, ErrorCode.QUOTA),
    *_HTTP,
)
_LOST = (ErrorCode.NO_WORKER, ErrorCode.MIGRATIONS, ErrorCode.QUARANTINED, ErrorCode.STALLED)
_TAKEN = (ErrorCode.STREAM_NOT_FOUND, ErrorCode.STREAM_TAKEN)
_GENERATES = (*_BODY, ErrorCode.INVALID_SCHEMA, *_LOST, *_TAKEN)
_GOES_ON = (ErrorCode.RESPONSE_NOT_FOUND, ErrorCode.PREVIOUS_NOT_FOUND)
_KEPT = (ErrorCode.RESPONSE_NOT_FOUND, *_HTTP)
_OPERATORS = (ErrorCode.FORBIDDEN, *_HTTP)
_CHANGES = (*_BODY, ErrorCode.FORBIDDEN, ErrorCode.NO_WORKER)
_PROBED = (ErrorCode.MODEL_NOT_FOUND, *_OPEN)
_OF_MODEL = {"model": {"type": "string"}}
_USAGE = (ErrorCode.INVALID_VALUE, ErrorCode.FORBIDDEN, *_HTTP)
_ASKED = (*_KEPT, ErrorCode.INVALID_VALUE, ErrorCode.UNSUPPORTED_PARAMETER)


class Operation(NamedTuple):
    method: str
    path: str
    does: str
    codes: tuple[ErrorCode, ...] = _HTTP
    body: Body | None = None
    reply: Any = None
    """A type as JSON, or a media type; None: there is only a refusal."""
    events: Any = None
    """Of a stream: a union of types."""
    query: Mapping[str, dict[str, Any]] = {}


OPERATIONS = (
    Operation(
        "POST", "/v1/chat/completions", "one or more answers to a conversation", _GENERATES, CHAT,
        openai.ChatReply, openai.ChatChunk,
    ),
    Operation(
        "POST", "/v1/completions", "one or more continuations of text or token ids", _GENERATES,
        COMPLETION, openai.CompletionReply, openai.CompletionChunk,
    ),
    Operation(
        "POST", "/v1/responses", "an answer in items", (*_GENERATES, *_GOES_ON), RESPONSES,
        ResponseBody, responses_shapes.StreamEvent,
    ),
    Operation(
        "POST", "/v1/responses/input_tokens", "how many tokens the input of a response has",
        (*_BODY, *_GOES_ON, ErrorCode.INVALID_SCHEMA), INPUT_TOKENS, InputTokens,
    ),
    Operation(
        "GET", "/v1/responses/{id}", "a response that is kept", _ASKED, reply=ResponseBody,
        query={"stream": {"type": "boolean"}},
    ),
    Operation("DELETE", "/v1/responses/{id}", "forgets a response", _KEPT, reply=ResponseDeleted),
    Operation(
        "GET", "/v1/responses/{id}/input_items", "what a response was asked", _ASKED,
        reply=InputItemList,
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
            "order": {"enum": ["asc", "desc"], "default": "desc"},
            "after": {"type": "string"},
        },
    ),
    Operation("POST", "/v1/responses/{id}/cancel", "refuses: none is in the background", _ASKED),
    Operation(
        "POST", "/v1/messages", "Anthropic's API: an answer in blocks", _GENERATES, MESSAGES,
        MessageReply, anthropic_shapes.StreamEvent,
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", "how many tokens a message's input has",
        (*_BODY, ErrorCode.INVALID_SCHEMA), COUNT_TOKENS, anthropic_shapes.TokensCount,
    ),
    Operation(
        "GET", "/v1/usage", "what an API key has used, and what is left of its limits", _USAGE,
        reply=UsageList, query={"key": {"type": "string"}},
    ),
    Operation(
        "GET", "/v1/models", "the models that are served, their adapters and other names",
        reply=openai.ModelList,
    ),
    Operation(
        "POST", "/v1/load_lora_adapter", "has every worker of a model load an adapter", _CHANGES,
        Body(adapters_api.LoadAdapterRequest), "text/plain",
    ),
    Operation(
        "POST", "/v1/unload_lora_adapter", "takes a LoRA adapter away", _CHANGES,
        Body(adapters_api.UnloadAdapterRequest), "text/plain",
    ),
    Operation(
        "GET", "/v1/models/{model}", "one of them, or that there is none of this name",
        (ErrorCode.MODEL_NOT_FOUND, *_HTTP), reply=openai.ModelCard,
    ),
    Operation(
        "POST", "/tokenize", "token ids of a text or a conversation", _BODY,
        Body(openai.TokenizeRequest), openai.TokenizeReply,
    ),
    Operation(
        "POST", "/detokenize", "text of token ids", _BODY, Body(openai.DetokenizeRequest),
        openai.DetokenizeReply,
    ),
    Operation(
        "GET", "/health", "whether a request can be served now", _PROBED, reply=Readiness,
        query=_OF_MODEL,
    ),
    Operation(
        "GET", "/readyz", "whether a request can be served now", _PROBED, reply=Readiness,
        query=_OF_MODEL,
    ),
    Operation("GET", "/livez", "that the process turns", _OPEN, reply=Alive),
    Operation("GET", "/metrics", "Prometheus' text form", _OPERATORS, reply="text/plain"),
    Operation("GET", "/version", "the version", reply=Version),
    Operation("GET", "/openapi.json", "this document", reply="application/json"),
    Operation("GET", "/cluster", "workers, blocks, queue", _OPERATORS, reply=Cluster),
    Operation(
        "GET", "/trace/{name}", "what all services did for a request", reply=TracesOut,
        codes=(ErrorCode.TRACE_NOT_FOUND, ErrorCode.NOT_READY, *_HTTP),
    ),
    Operation("GET", "/", "the playground for browsers, links for others", reply=Index),
    Operation(
        "GET", "/playground/{name}", "a file of the playground", (ErrorCode.UNKNOWN_URL, *_OPEN),
        reply="*/*",
    ),
)  # fmt: skip
