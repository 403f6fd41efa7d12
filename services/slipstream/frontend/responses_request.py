"""A request of the Responses API, read: what the model is asked, and what the response repeats."""

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.context import Context
from slipstream.frontend.generation import Call
from slipstream.frontend.inner_chat import Conversation, check_unserved
from slipstream.frontend.responses_input import Tools, read_input, read_tools, response_format
from slipstream.frontend.responses_shapes import (
    NEUTRAL_RESPONSES,
    PASSED,
    InputTokensRequest,
    ReasoningConfig,
    ResponseBody,
    ResponsesRequest,
    TextConfig,
    UnservedResponses,
)
from slipstream.frontend.validate import LOGPROBS_MAX, at_most, integer, refuse, shown

LOGPROBS = "message.output_text.logprobs"
METADATA_MAX, METADATA_KEY_MAX, METADATA_VALUE_MAX = 16, 64, 512


class Asked(msgspec.Struct, kw_only=True):
    conversation: Any
    """`Conversation` without instructions: what a later request may go on from."""
    instructions: str | None
    items: list[dict[str, Any]]
    """Those of this request."""
    tools: Tools
    format: dict[str, Any] | None
    """As of a chat."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = self.conversation.messages
        if self.instructions is None:
            return said
        return [{"role": "system", "content": self.instructions}, *said]

    @property
    def origins(self) -> list[str]:
        said: list[str] = self.conversation.origins
        return said if self.instructions is None else ["instructions", *said]


async def read(body: ResponsesRequest | InputTokensRequest, context: Context) -> Asked:
    check_unserved(body, UnservedResponses, NEUTRAL_RESPONSES)
    store = context.responses
    conversation = Conversation()
    if body.previous_response_id is not None:
        entry = await store.find(body.previous_response_id)
        if entry is None:
            refuse(
                f"No response is kept by the id {shown(body.previous_response_id)}. "
                f"{store.limits()}; send the whole conversation as input.",
                "previous_response_id",
                ErrorCode.PREVIOUS_NOT_FOUND,
            )
        conversation = Conversation(msgspec.json.decode(entry.messages))
    return Asked(
        items=await read_input(body.input, conversation, store),
        conversation=conversation,
        instructions=body.instructions,
        tools=read_tools(body),
        format=response_format(body.text.format if body.text else None),
    )


def chat_fields(body: ResponsesRequest, asked: Asked) -> Mapping[str, Any]:
    """The same as a chat's body. Refuses what a chat would not see."""
    _check(body)
    logprobs = bool(body.top_logprobs) or LOGPROBS in (body.include or ())
    return {
        **{name: getattr(body, name) for name in PASSED},
        "model": body.model,
        "messages": asked.messages,
        "max_completion_tokens": body.max_output_tokens,
        "response_format": asked.format,
        "tools": asked.tools.functions,
        "tool_choice": asked.tools.choice,
        "parallel_tool_calls": body.parallel_tool_calls if asked.tools.served else None,
        "logprobs": True if logprobs else None,
        "top_logprobs": (body.top_logprobs or 0) if logprobs else None,
    }


def _check(body: ResponsesRequest) -> None:
    if body.truncation not in (None, "auto", "disabled"):
        refuse(f"truncation must be disabled, but is {shown(body.truncation)}.", "truncation")
    if body.top_logprobs is not None:
        integer("top_logprobs", body.top_logprobs, 0, LOGPROBS_MAX)
    pairs = body.metadata or {}
    at_most("metadata", pairs, METADATA_MAX)
    for key, value in pairs.items():
        if len(key) > METADATA_KEY_MAX or len(value) > METADATA_VALUE_MAX:
            refuse(
                f"metadata[{shown(key)}] is too long: keys have at most {METADATA_KEY_MAX} "
                f"characters, values {METADATA_VALUE_MAX}.",
                "metadata",
            )


def begun(body: ResponsesRequest, asked: Asked, call: Call) -> ResponseBody:
    """The response before its first token."""
    sampling = call.submissions[0].sampling
    text = body.text or TextConfig()
    choice = body.tool_choice if asked.tools.choice is not None else None
    parallel = body.parallel_tool_calls
    return ResponseBody(
        id=call.id,
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=call.model,
        parallel_tool_calls=True if parallel is None else parallel,
        previous_response_id=body.previous_response_id,
        reasoning=body.reasoning or ReasoningConfig(),
        temperature=sampling.temperature,
        text=TextConfig(format=text.format or {"type": "text"}, verbosity=text.verbosity),
        tool_choice=choice or "auto",
        tools=[_tool_out(tool) for tool in asked.tools.served],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        user=body.user,
    )


def _tool_out(tool: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI repeats it: with every member that a function has."""
    members = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in members}
