"""`{"name": "f", "parameters": {…}}`, several with `; ` between: Llama 3.1 to 3.3.

An answer is a call if it begins like one. `<|python_tag|>` announces one anywhere.
"""

from collections.abc import Sequence

from slipstream.tokenizer.formats import lark
from slipstream.tokenizer.formats.json_call import JsonCalls
from slipstream.tokenizer.formats.lark import Function, Ref

TAG = "<|python_tag|>"


class Llama3JsonParser(JsonCalls):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._start
        self._tagged = False

    def _step(self) -> bool:
        return self._state()

    def _start(self) -> bool:
        body = self._text.lstrip()
        self._content(self._take(len(self._text) - len(body)))
        if not body or (TAG.startswith(body) and body != TAG and not self._ended):
            return False
        self._tagged = body.startswith(TAG)
        self._state = self._opened if self._tagged or body.startswith("{") else self._free
        return True

    def _free(self) -> bool:
        if not self._content_until(TAG):
            return False
        self._tagged, self._state = True, self._opened
        return True

    def _opened(self) -> bool:
        """In front: the tag if there is one, and what may be a call."""
        marker = self._take(len(TAG) if self._tagged else 0)
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
            self._state = self._between
        return bool(self._text)

    def _between(self) -> bool:
        self._text = self._text.lstrip()
        if self._text:
            self._text = self._text.removeprefix(";")
            self._state = self._start
        return bool(self._text)


def rules(functions: Sequence[Function], calls_max: int, ref: Ref) -> str:
    """Rule `calls`: one call or more."""
    calls = lark.repeated("object", lark.text("; "), calls_max)
    return f"calls: {calls}\n{lark.json_calls(functions, 'parameters')}"
