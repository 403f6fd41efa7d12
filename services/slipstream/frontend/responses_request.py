"""A request of the Responses API, read: what the model is asked, and what the response repeats."""

import time
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.generation import Call
from slipstream.frontend.inner_chat import BETWEEN, Conversation, check_unserved
from slipstream.frontend.responses_input import References, read_input
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
from slipstream.frontend.responses_store import ResponseStore
from slipstream.frontend.responses_tools import Tools, format_out, read_tools, response_format
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
        """With the instructions. There are templates that allow one system message."""
        said: list[dict[str, Any]] = self.conversation.messages
        if self.instructions is None:
            return said
        texts = [self.instructions, *(one["content"] for one in said[: self._leading])]
        merged = {"role": "system", "content": BETWEEN.join(texts)}
        return [merged, *said[self._leading :]]

    @property
    def origins(self) -> list[str]:
        said: list[str] = self.conversation.origins
        return said if self.instructions is None else ["instructions", *said[self._leading :]]

    @property
    def _leading(self) -> int:
        """Messages at the beginning that instruct, like `instructions`."""
        roles = (one["role"] for one in self.conversation.messages)
        return sum(1 for _ in takewhile(("system", "developer").__contains__, roles))


async def read(
    body: ResponsesRequest | InputTokensRequest, store: ResponseStore, max_bytes: int
) -> Asked:
    """`max_bytes`: of what references refer to."""
    check_unserved(body, UnservedResponses, NEUTRAL_RESPONSES)
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
        items=await read_input(body.input, conversation, References(store, max_bytes)),
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
        text=TextConfig(format=format_out(asked.format), verbosity=text.verbosity),
        tool_choice="auto" if asked.tools.choice is None else asked.tools.choice_out,
        tools=[_tool_out(tool) for tool in asked.tools.served],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        user=body.user,
    )


def _tool_out(tool: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI repeats it: with every member that a function has."""
    members = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in members}
