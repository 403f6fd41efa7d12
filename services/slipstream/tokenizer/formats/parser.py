"""What every parser of answers is made of.

Parsers are pure and incremental: the parts are the same however the text is cut, joined where they
are of one kind, and reading n characters takes time in proportion to n.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from slipstream.messages import Part, PartKind

HEAD_CHARS_MAX = 1024
"""From where a call may begin to its first argument; longer, it is content."""


class Parser(Protocol):
    def push(self, text: str) -> list[Part]:
        """What is certain after so much more of the answer."""
        ...

    def end(self) -> list[Part]:
        """What was held back. Nothing is pushed afterwards."""
        ...


class Plain:
    """Everything is content."""

    def push(self, text: str) -> list[Part]:
        return [Part(PartKind.CONTENT, text)] if text else []

    def end(self) -> list[Part]:
        return []


class FirstCall:
    """Of several calls only the first is told."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._calls = 0

    def push(self, text: str) -> list[Part]:
        return self._kept(self._parser.push(text))

    def end(self) -> list[Part]:
        return self._kept(self._parser.end())

    def _kept(self, parts: list[Part]) -> list[Part]:
        kept = []
        for part in parts:
            self._calls += part.kind is PartKind.CALL
            if self._calls <= 1 or part.kind not in (PartKind.CALL, PartKind.ARGUMENTS):
                kept.append(part)
        return kept


def merged(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one part; each call stays its own."""
    joined: list[tuple[PartKind, list[str]]] = []
    for kind, text in ((part.kind, part.text) for part in parts):
        if joined and joined[-1][0] is kind and kind is not PartKind.CALL:
            joined[-1][1].append(text)
        else:
            joined.append((kind, [text]))
    return [Part(kind, "".join(texts)) for kind, texts in joined]


class ToolParser:
    """Content with calls in it. A format is a `_step`, which takes something off the front of
    `_text`, or returns False: not before there is more of it."""

    def __init__(self) -> None:
        self._text = ""
        self._ended = False
        self._parts: list[Part] = []
        self._spaces: list[str] = []
        """White space that belongs to the content if more of it follows, and to a call if not."""
        self._said = self._called = False

    def push(self, text: str) -> list[Part]:
        self._text += text
        while self._text and self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def end(self) -> list[Part]:
        self._ended = True
        parts = self.push("")
        self._content(self._text)
        if self._spaces and not self._called:
            self._parts.append(Part(PartKind.CONTENT, "".join(self._spaces)))
        return parts + self._parts

    def _step(self) -> bool:
        raise NotImplementedError

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _content(self, text: str) -> None:
        body = text.rstrip()
        if body:
            before = "".join(self._spaces)
            said = before + body if self._said or not self._called else (before + body).lstrip()
            self._parts.append(Part(PartKind.CONTENT, said))
            self._said, self._spaces = True, []
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def _call(self, name: str) -> None:
        self._called = True
        self._parts.append(Part(PartKind.CALL, name))

    def _arguments(self, text: str) -> None:
        if text:
            self._parts.append(Part(PartKind.ARGUMENTS, text))

    def _content_until(self, marker: str) -> bool:
        """Takes content up to a marker; True if the marker is now in front."""
        found = self._text.find(marker)
        safe = held_from(self._text, marker) if found < 0 else found
        self._content(self._take(safe))
        return found >= 0


def held_from(text: str, marker: str) -> int:
    """Where the tail begins that more text may make the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length
    return len(text)


class Reading(NamedTuple):
    match: re.Match[str] | None
    hopeless: bool
    """There is none, whatever follows."""


class Head:
    """A pattern, given in pieces, that a text begins with, or may begin with when it goes on.

    A piece is a regular expression that also matches each beginning of what it matches, as a
    character does, or one that is repeated.
    """

    def __init__(self, *pieces: str) -> None:
        self._full = re.compile("".join(pieces), re.DOTALL)
        nested = ""
        for piece in reversed(pieces):
            nested = f"(?:{_nameless(piece)}{nested})?"
        self._begun = re.compile(nested + r"\\?", re.DOTALL)  # half of an escape

    def read(self, text: str) -> Reading:
        window = text[:HEAD_CHARS_MAX]
        if match := self._full.match(window):
            return Reading(match, False)
        goes_on = len(window) < HEAD_CHARS_MAX
        return Reading(None, not (goes_on and self._begun.fullmatch(window)))


def _nameless(piece: str) -> str:
    return re.sub(r"\(\?P<\w+>", "(?:", piece)
