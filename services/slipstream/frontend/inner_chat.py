"""Bodies of other APIs as chats: conversations in chat messages, names translated back."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend import validate
from slipstream.frontend.chat_api import chat_call
from slipstream.frontend.context import Context
from slipstream.frontend.gateway import ClusterStatus
from slipstream.frontend.generation import Call
from slipstream.frontend.openai import ChatRequest
from slipstream.frontend.problems import ApiError
from slipstream.types import count_tokens

BETWEEN = "\n\n"
"""Between two texts of one message."""
SKIPPED_HEADER = "x-slipstream-skipped-tools"

_decoder = msgspec.json.Decoder(ChatRequest)


def chat(
    request: web.Request,
    context: Context,
    fields: Mapping[str, Any],
    status: ClusterStatus,
    prefix: str,
) -> Call:
    """The call of a chat with these fields, under an id with this prefix. ApiError as of a chat."""
    for name in ("tools", "tool_choice", "response_format", "chat_template_kwargs"):
        validate.check_depth(name, fields.get(name))
    named = {name: value for name, value in fields.items() if value is not None}
    body = validate.decode(_decoder, msgspec.json.encode(named))
    return chat_call(request, context, body, status, prefix)


async def count_chat_tokens(
    request: web.Request, context: Context, fields: Mapping[str, Any], status: ClusterStatus
) -> int:
    """Tokens of the prompt that such a chat would have."""
    call = chat(request, context, fields, status, "count_")
    asked = call.submissions[0]
    coded = await context.gateway.codec(asked.prompt, b"", asked.model)
    if coded.problem is not None:
        raise ApiError(coded.problem)
    return count_tokens(coded.tokens)


def skipped_header(skipped: Sequence[str]) -> dict[str, str]:
    """Names tools that are no functions; cut, because a header has its limits."""
    return {SKIPPED_HEADER: ", ".join(skipped)[:1000]} if skipped else {}


class Conversation:
    """Chat messages, put together from items that may be less than a message. `origins` says for
    each where in the body it began."""

    def __init__(self, earlier: Sequence[dict[str, Any]] = (), joins: bool = False) -> None:
        """`joins`: what one role says in several turns in a row is one message."""
        self._joins = joins
        self._messages = [_opened(message) for message in earlier]
        """Contents and reasoning in pieces: a long sum is not made again for each of them."""
        self.origins = ["previous_response_id"] * len(self._messages)
        self._thoughts: list[str] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [_closed(message) for message in self._messages]

    def say(self, role: str, text: str, at: str) -> None:
        last = self._messages[-1]["role"] if self._messages else ""
        calling = role == "assistant" and self._calling()  # between its calls, or behind them
        if calling or (self._joins and last == role):
            self._messages[-1]["content"].append(text)
            self._thought()
        else:
            self._add({"role": role, "content": [text]}, at)

    def think(self, text: str) -> None:
        """Belongs to what the assistant says or calls next."""
        self._thoughts.append(text)

    def call(self, call_id: str, name: str, arguments: str, at: str) -> None:
        """In the message before it, if that is the assistant's: calls are answered together."""
        spoke = bool(self._messages) and self._messages[-1]["role"] == "assistant"
        if not spoke or (self._thoughts and not self._calling()):
            self._add({"role": "assistant", "content": []}, at)
        function = {"name": name, "arguments": arguments}
        calls = self._messages[-1].setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})
        self._thought()

    def result(self, call_id: str, text: str, at: str) -> None:
        self._add({"role": "tool", "tool_call_id": call_id, "content": [text]}, at)

    def _calling(self) -> bool:
        return bool(self._messages) and "tool_calls" in self._messages[-1]

    def _add(self, message: dict[str, Any], at: str) -> None:
        self._messages.append(message)
        self.origins.append(at)
        if message["role"] == "assistant":
            self._thought()
        self._thoughts.clear()

    def _thought(self) -> None:
        if self._thoughts:
            self._messages[-1].setdefault("reasoning_content", []).extend(self._thoughts)
            self._thoughts.clear()


def _opened(message: dict[str, Any]) -> dict[str, Any]:
    opened = {**message, "content": [] if message["content"] is None else [message["content"]]}
    if "reasoning_content" in message:
        opened["reasoning_content"] = [message["reasoning_content"]]
    return opened


def _closed(message: dict[str, Any]) -> dict[str, Any]:
    """Only calls can be without a content."""
    said = message["content"]
    closed = {**message, "content": BETWEEN.join(filter(None, said)) if said else None}
    if "reasoning_content" in message:
        closed["reasoning_content"] = "".join(message["reasoning_content"])
    return closed


def check_unserved(
    body: msgspec.Struct, unserved: type[msgspec.Struct], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
    """Members of `unserved` are refused by name, but for null and values that change nothing."""
    for name in unserved.__struct_fields__:
        value = getattr(body, name)
        if value is not None and not any(_same(value, one) for one in neutral.get(name, ())):
            validate.refuse(
                f"'{name}' is not served here and was given as {validate.shown(value)}; leave it "
                "out.",
                name,
                ErrorCode.UNSUPPORTED_PARAMETER,
            )


def _same(value: Any, neutral: Any) -> bool:
    """`True` is no 1."""
    return isinstance(value, bool) is isinstance(neutral, bool) and bool(value == neutral)


_INDEX = re.compile(r"\bmessages\[(\d+)\](?:\.\w+)?")


@contextlib.contextmanager
def naming(names: Mapping[str, str], origins: Sequence[str] = ()) -> Iterator[None]:
    """Errors inside say the fields of the client's body: `names` has a pattern of ours -> theirs,
    `origins` what the messages were made of."""

    def theirs(text: str) -> str:
        text = _INDEX.sub(lambda m: origins[int(m[1])] if int(m[1]) < len(origins) else m[0], text)
        for pattern, name in names.items():
            text = re.sub(rf"(?<![\w.]){pattern}(?!\w)", name, text)
        return text

    try:
        yield
    except ApiError as error:
        problem = error.problem
        told = Problem(
            code=problem.code,
            message=theirs(problem.message),
            param=None if problem.param is None else theirs(problem.param),
            retry_after_s=problem.retry_after_s,
        )
        raise ApiError(told, error.headers) from None
