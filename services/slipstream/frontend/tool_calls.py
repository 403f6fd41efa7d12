"""An answer in blocks: what the model thinks, says and calls, put together from its parts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from slipstream.messages import Part, PartKind, TextDelta
from slipstream.types import count_tokens


def call_id(answer_id: str, choice: int, number: int) -> str:
    """Of the call of that number, from 0, in that choice: a stream and a whole answer name it
    alike, and no two answers do."""
    named = f"{answer_id}/{choice}/{number}".encode()
    return f"call_{hashlib.blake2b(named, digest_size=12).hexdigest()}"


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


def _plain(delta: TextDelta) -> tuple[Part, ...]:
    return (Part(PartKind.CONTENT, delta.text),) if delta.text else ()


@dataclass(slots=True, eq=False)
class Block:
    """Text of one kind without a break: reasoning, content, or the arguments of one call."""

    kind: PartKind
    index: int
    name: str = ""
    call_id: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Change(Enum):
    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


class Blocks:
    """One choice's answer as it grows. `take` each delta; `close` after the last one."""

    def __init__(self, answer_id: str, choice: int = 0) -> None:
        self._answer_id, self._choice = answer_id, choice
        self._open: Block | None = None
        self._calls = 0
        self._untold_tokens = 0
        """Whose text has not come yet."""
        self.blocks: list[Block] = []
        self.reasoning_tokens = 0

    def take(self, delta: TextDelta) -> Iterator[tuple[Change, Block, str]]:
        """What changes, in order; the text is that of a block that grew."""
        for part in delta.parts or _plain(delta):
            yield from self._take(part)
        self._untold_tokens += count_tokens(delta.tokens)
        if self._open is not None:
            if self._open.kind is PartKind.REASONING:
                self.reasoning_tokens += self._untold_tokens
            self._untold_tokens = 0

    def _take(self, part: Part) -> Iterator[tuple[Change, Block, str]]:
        if not part.text:
            return
        kind = PartKind.CALL if part.kind is PartKind.ARGUMENTS else part.kind
        if self._open is None or self._open.kind is not kind or part.kind is PartKind.CALL:
            yield from self.close()
            yield Change.OPENED, self._begin(part), ""
        if part.kind is not PartKind.CALL and self._open is not None:
            self._open.pieces.append(part.text)
            yield Change.GREW, self._open, part.text

    def _begin(self, part: Part) -> Block:
        block = self._open = Block(part.kind, len(self.blocks))
        if part.kind is PartKind.CALL:
            block.name = part.text
            block.call_id = call_id(self._answer_id, self._choice, self._calls)
            self._calls += 1
        self.blocks.append(block)
        return block

    def close(self) -> Iterator[tuple[Change, Block, str]]:
        closed, self._open = self._open, None
        if closed is not None:
            yield Change.CLOSED, closed, ""

    def text(self, kind: PartKind) -> str:
        """Of all blocks of that kind."""
        return "".join(block.text for block in self.blocks if block.kind is kind)

    @property
    def num_calls(self) -> int:
        return self._calls

    def calls(self) -> list[ToolCall]:
        return [
            ToolCall(block.call_id, block.name, block.text)
            for block in self.blocks
            if block.kind is PartKind.CALL
        ]
