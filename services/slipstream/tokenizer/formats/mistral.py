"""`[TOOL_CALLS][{"name": "f", "arguments": {…}}]`, and since version 11 of Mistral's tokenizer
`[TOOL_CALLS]f[ARGS]{…}` for each call, with or without `[ARGS]`."""

import re
from collections.abc import Sequence

from slipstream.tokenizer.formats import lark
from slipstream.tokenizer.formats.json_call import JsonCalls, JsonScan
from slipstream.tokenizer.formats.lark import Function, Ref
from slipstream.tokenizer.formats.parser import HEAD_CHARS_MAX

MARKERS = MARKER, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_named = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?\s*(?:\[ARGS\])?\s*(?P<arguments>\{)\s*[\"}]"
).match
_may_be_named = re.compile(r"[\w.\-\[\]\s]*(?:\{\s*)?").fullmatch


class MistralParser(JsonCalls):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._free

    def _step(self) -> bool:
        return self._state()

    def _free(self) -> bool:
        if not self._content_until(MARKER):
            return False
        self._state = self._opened
        return True

    def _opened(self) -> bool:
        """In front: the marker, and what may be a list of calls, or one call."""
        window = self._text[len(MARKER) : len(MARKER) + HEAD_CHARS_MAX]
        body = window.lstrip()
        if body.startswith("["):
            return self._element(MARKER, self._text[len(MARKER) + len(window) - len(body) + 1 :])
        if match := _named(window):
            self._take(len(MARKER) + match.start("arguments"))
            self._call(match["name"])
            self._scan, self._told, self._wrapped = JsonScan(), True, False
            self._state = self._inside
            return True
        hopeless = len(window) == HEAD_CHARS_MAX or not _may_be_named(window)
        return (hopeless or self._ended) and self._give_up(MARKER)

    def _element(self, marker: str, body: str) -> bool:
        """An object of a list: what came before it is told if it is none."""
        whole, self._text = self._text, body
        head = self._begin_call()
        if head.name:
            self._wrapped, self._state = True, self._inside
            return True
        self._text = whole
        return (head.hopeless or self._ended) and self._give_up(marker)

    def _give_up(self, marker: str) -> bool:
        self._content(self._take(len(marker)))
        self._state = self._free
        return True

    def _inside(self) -> bool:
        if self._scanned():
            self._state = self._between if self._wrapped else self._free
        return bool(self._text)

    def _between(self) -> bool:
        self._text = self._text.lstrip()
        if self._text.startswith(","):
            return self._element(",", self._text[1:])
        if self._text:
            self._text = self._text.removeprefix("]")
            self._state = self._free
        return bool(self._text)


def listed_rules(functions: Sequence[Function], calls_max: int, ref: Ref) -> str:
    """Rule `calls`: a list of one call or more."""
    calls = lark.repeated("object", lark.text(", "), calls_max)
    whole = f"{ref(MARKER)} {lark.text('[')} {calls} {lark.text(']')}"
    return f"calls: {whole}\n{lark.json_calls(functions, 'arguments')}"


def named_rules(functions: Sequence[Function], calls_max: int, ref: Ref) -> str:
    """Rule `calls`: one call or more, each with its marker."""
    options = [
        f"{lark.text(f.name)} {ref(ARGUMENTS)} arguments_{i}" for i, f in enumerate(functions)
    ]
    schemas = [f"arguments_{i}: {lark.arguments(f.schema)}" for i, f in enumerate(functions)]
    calls = f"call{{1,{calls_max}}}" if calls_max > 1 else "call"
    return "\n".join([f"calls: {calls}", f"call: {ref(MARKER)} ({lark.either(options)})", *schemas])
