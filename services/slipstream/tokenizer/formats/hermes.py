"""`<tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>`: Hermes, Qwen 2.5 and 3."""

from collections.abc import Sequence

from slipstream.tokenizer.formats import lark
from slipstream.tokenizer.formats.json_call import JsonCalls
from slipstream.tokenizer.formats.lark import Function, Ref

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(JsonCalls):
    _bare = True

    def __init__(self) -> None:
        super().__init__()
        self._state = self._free

    def _step(self) -> bool:
        return self._state()

    def _free(self) -> bool:
        if self._content_until(OPEN):
            self._state = self._opened
        return self._state == self._opened

    def _opened(self) -> bool:
        """In front: the marker, and what may be a call."""
        marker = self._take(len(OPEN))
        head = self._begin_call()
        if head.name:
            self._state = self._inside
        elif head.hopeless or self._ended:
            self._content(marker)
            self._state = self._free
        else:
            self._text = marker + self._text
            return False
        return True

    def _inside(self) -> bool:
        if self._scanned():
            self._state = self._after
        return bool(self._text)

    def _after(self) -> bool:
        self._text = self._text.lstrip()
        if CLOSE.startswith(self._text) and self._text != CLOSE and not self._ended:
            return False
        self._text = self._text.removeprefix(CLOSE)
        self._state = self._free
        return True


def rules(functions: Sequence[Function], calls_max: int, ref: Ref) -> str:
    """Rule `calls`: one call or more."""
    begin, end = lark.text("\n"), lark.text("\n")
    return "\n".join(
        [
            f"calls: {lark.repeated('call', begin, calls_max)}",
            f"call: {ref(OPEN)} {begin} object {end} {ref(CLOSE)}",
            lark.json_calls(functions, "arguments"),
        ]
    )
