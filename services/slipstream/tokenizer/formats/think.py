"""`<think>…</think>` before the answer: Qwen 3, DeepSeek R1 and those after them."""

from slipstream.messages import Part, PartKind
from slipstream.tokenizer.formats.parser import Parser, held_from

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser:
    """Reasoning until `</think>`, then what another parser makes of the rest. White space at the
    seams belongs to nobody.

    `inside`: the prompt has opened it. Else the answer must begin with `<think>`, or it has none.
    """

    def __init__(self, inside: bool, answer: Parser) -> None:
        self._inside = inside
        self._answer = answer
        self._state = self._start
        self._text = ""
        self._spaces: list[str] = []
        self._said = False

    def push(self, text: str) -> list[Part]:
        if self._state == self._answered:
            return self._answer.push(text)
        self._text += text
        return self._state(False)

    def end(self) -> list[Part]:
        return self._state(True) + self._answer.end()

    def _start(self, ended: bool) -> list[Part]:
        body = self._text.lstrip()
        self._spaces.append(self._text[: len(self._text) - len(body)])
        self._text = body
        if OPEN.startswith(body) and body != OPEN and not ended:
            return []
        if not body.startswith(OPEN) and not self._inside:
            return self._rest()
        self._text = body.removeprefix(OPEN)
        self._spaces = []
        self._state = self._thinks
        return self._thinks(ended)

    def _thinks(self, ended: bool) -> list[Part]:
        found = self._text.find(CLOSE)
        safe = found if found >= 0 else len(self._text) if ended else held_from(self._text, CLOSE)
        thought, self._text = self._text[:safe], self._text[safe:]
        parts = self._reasoning(thought)
        if found >= 0:
            self._text = self._text.removeprefix(CLOSE)
            self._state = self._seam
            parts += self._seam(ended)
        return parts

    def _seam(self, ended: bool) -> list[Part]:
        self._spaces = []
        self._text = self._text.lstrip()
        return self._rest() if self._text else []

    def _rest(self) -> list[Part]:
        self._state = self._answered
        text, self._text = "".join(self._spaces) + self._text, ""
        return self._answer.push(text)

    def _answered(self, ended: bool) -> list[Part]:
        return []

    def _reasoning(self, text: str) -> list[Part]:
        body = text.rstrip() if self._said else text.strip()
        parts = []
        if body:
            parts.append(Part(PartKind.REASONING, "".join(self._spaces) + body))
            self._said, self._spaces = True, []
        if self._said and (tail := text[len(text.rstrip()) :]):
            self._spaces.append(tail)
        return parts
