"""Items of the Responses API in the words of a chat."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.errors import ErrorCode
from slipstream.frontend.inner_chat import Conversation
from slipstream.frontend.responses_store import ResponseStore
from slipstream.frontend.validate import at_most, not_empty, refuse, shown
from slipstream.messages import PartKind

ITEMS_MAX = 10_000
ITEM_ID_CHARS_MAX = 64
TEXT_PARTS = ("input_text", "output_text", "text")
STATUSES = ("completed", "incomplete", "in_progress")
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fc",
}
NAMES = {
    r"messages": "input",
    r"max_tokens": "max_output_tokens",
    r"max_completion_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    r"(response_format|structured_outputs)": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
}
"""Our fields in a chat -> theirs."""


Item = dict[str, Any]

_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_(i?)([0-9]{1,5})")


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


class References:
    """The items that those of one request refer to. Each list that is kept is read once, and what
    is taken out of them, time by time, has at most `max_bytes`."""

    def __init__(self, store: ResponseStore, max_bytes: int) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._lists: dict[tuple[str, str], list[msgspec.Raw]] = {}
        self._items: dict[str, tuple[Item, int]] = {}
        self._num_bytes = 0

    async def find(self, item_id: Any, at: str) -> Item:
        found = await self._find(item_id) if isinstance(item_id, str) else None
        if found is None:
            refuse(
                f"{at} refers to {shown(item_id)}, which is not kept. {self._store.limits()}; send "
                "the item.",
                f"{at}.id",
                ErrorCode.RESPONSE_NOT_FOUND,
            )
        item, num_bytes = found
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            refuse(
                f"The items that input refers to, up to {at}, have {self._num_bytes} bytes; the "
                f"limit is {self._max_bytes} bytes. Refer to fewer of them.",
                f"{at}.id",
                ErrorCode.TOO_LARGE,
            )
        return item

    async def _find(self, item_id: str) -> tuple[Item, int] | None:
        if item_id not in self._items and (named := _ITEM_ID.fullmatch(item_id)):
            response, of_input, index = named.groups()
            items = await self._list(response, of_input)
            if int(index) < len(items):
                raw = items[int(index)]
                item = msgspec.json.decode(raw, type=Item)
                if item["id"] == item_id:
                    self._items[item_id] = item, memoryview(raw).nbytes
        return self._items.get(item_id)

    async def _list(self, response: str, of_input: str) -> list[msgspec.Raw]:
        found = self._lists.get((response, of_input))
        if found is None:
            entry = await self._store.find(f"resp_{response}")
            if entry is None:
                found = []
            elif of_input:
                found = msgspec.json.decode(entry.input_items, type=list[msgspec.Raw])
            else:
                found = msgspec.json.decode(entry.response, type=_Output).output
            self._lists[response, of_input] = found
            await asyncio.sleep(0)  # there may be many, and others wait
        return found


async def read_input(
    given: str | list[Item], into: Conversation, references: References
) -> list[Item]:
    """The items, rebuilt from what is known of them; those that were references as what they refer
    to."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    not_empty("input", given, "send at least one item")
    at_most("input", given, ITEMS_MAX)
    items = []
    for i, item in enumerate(given):
        at = f"input[{i}]"
        kind = item.get("type", "message" if "role" in item else "item_reference")
        if kind == "item_reference":
            item = await references.find(item.get("id"), at)
            kind = item["type"]
        items.append(_known(item) | _read(kind, item, at, into))
    return items


def _known(item: Item) -> Item:
    """What every item may have."""
    item_id, status = item.get("id"), item.get("status")
    known = {"status": status if status in STATUSES else "completed"}
    if isinstance(item_id, str) and 1 <= len(item_id) <= ITEM_ID_CHARS_MAX:
        known["id"] = item_id
    return known


def _read(kind: Any, item: Item, at: str, into: Conversation) -> Item:
    """The item's own members."""
    match kind:
        case "message":
            role = _role(item, at)
            texts = _texts(item.get("content"), f"{at}.content")
            into.say(role, _joined(texts), at)
            return {"type": "message", "role": role, "content": _parts(texts, role)}
        case "function_call":
            call_id = _string(item.get("call_id"), f"{at}.call_id")
            name = _string(item.get("name"), f"{at}.name")
            arguments = _string(item.get("arguments"), f"{at}.arguments")
            into.call(call_id, name, arguments, at)
            return {"type": kind, "call_id": call_id, "name": name, "arguments": arguments}
        case "function_call_output":
            call_id = _string(item.get("call_id"), f"{at}.call_id")
            output = _joined(_texts(item.get("output"), f"{at}.output"))
            into.result(call_id, output, at)
            return {"type": kind, "call_id": call_id, "output": output}
        case "reasoning":
            thoughts = _thoughts(item, at)
            into.think("".join(thoughts))
            content = [{"type": "reasoning_text", "text": text} for text in thoughts]
            return {"type": kind, "summary": [], "content": content}
    refuse(
        f"{at} is of type {shown(kind)}; served are message, function_call, "
        "function_call_output, reasoning and item_reference.",
        f"{at}.type",
        ErrorCode.UNSUPPORTED_CONTENT,
    )


def _role(item: Item, at: str) -> str:
    role = item.get("role")
    if role in ("user", "assistant", "system", "developer"):
        return str(role)
    refuse(
        f"{at}.role must be user, assistant, system or developer, but is {shown(role)}.",
        f"{at}.role",
    )


def _texts(content: Any, at: str) -> list[tuple[str, str]]:
    """(kind, text) of each part."""
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        refuse(
            f"{at} must be a string or a list of text parts, but is {shown(content)}.",
            at,
            ErrorCode.INVALID_TYPE,
        )
    return [_part(part, f"{at}[{i}]") for i, part in enumerate(content)]


def _joined(texts: Sequence[tuple[str, str]]) -> str:
    """One text; parts are joined as they are."""
    return "".join(text for _, text in texts)


def _part(part: Any, at: str) -> tuple[str, str]:
    match part:
        case {"type": "refusal" as kind, "refusal": str(text)}:
            return kind, text
        case {"type": kind, "text": str(text)} if kind in TEXT_PARTS:
            return "text", text
        case {"type": kind} if kind in TEXT_PARTS:
            refuse(f"{at}.text must be a string.", f"{at}.text", ErrorCode.INVALID_TYPE)
        case {"type": kind}:
            refuse(
                f"{at} is of type {shown(kind)}; this model reads parts of type 'input_text'.",
                at,
                ErrorCode.UNSUPPORTED_CONTENT,
            )
    refuse(f"{at} must be an object with a type, but is {shown(part)}.", at, ErrorCode.INVALID_TYPE)


def _parts(texts: Sequence[tuple[str, str]], role: str) -> list[Item]:
    """As a message of that role has them."""
    plain: Item = {"type": "input_text"}
    if role == "assistant":
        plain = {"type": "output_text", "annotations": []}
    return [
        {"type": kind, "refusal": text} if kind == "refusal" else {**plain, "text": text}
        for kind, text in texts
    ]


def _string(value: Any, at: str) -> str:
    if isinstance(value, str):
        return value
    refuse(f"{at} must be a string, but is {shown(value)}.", at, ErrorCode.INVALID_TYPE)


def _thoughts(item: Item, at: str) -> list[str]:
    """What the model thought; a summary says less, and what is encrypted nothing."""
    parts = item.get("content") or item.get("summary") or []
    match parts:
        case [*_] if all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            return [part["text"] for part in parts]
    refuse(f"{at}.content must be a list of texts.", f"{at}.content", ErrorCode.INVALID_TYPE)


def with_ids(items: list[Item], name: str) -> list[Item]:
    """As `GET …/input_items` shows them; ours are for those without one. `name`: hex digits of the
    response."""
    return [{"id": f"{PREFIXES[item['type']]}_{name}_i{i}", **item} for i, item in enumerate(items)]


def remember(conversation: Conversation, output: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation with the answer's blocks."""
    for block in output:
        match block.kind:
            case PartKind.REASONING:
                conversation.think(block.text)
            case PartKind.CONTENT:
                conversation.say("assistant", block.text, "output")
            case PartKind.CALL:
                conversation.call(block.call_id, block.name, block.text, "output")
    return conversation.messages
