"""Token ids to text, one token at a time.

The state after n tokens depends on those n tokens alone, never on how they were batched, so that a
process that replays a stream's tokens stands exactly where the lost one stood.
"""

import codecs
from collections.abc import Collection, Iterable
from typing import Protocol

PROMPT_TAIL_TOKENS = 8
"""Prompt tokens that are enough to know what the first output token continues."""


class TokenBytes(Protocol):
    """What decoding needs to know about a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def strip_leading(self) -> int:
        """Spaces that the tokenizer adds in front of a text, and that decoding takes away."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...


def spelled(codec: TokenBytes, texts: Collection[str]) -> frozenset[int]:
    """The special tokens that are written so."""
    wanted = {text.encode() for text in texts}
    if not wanted:
        return frozenset()
    return frozenset(token for token in codec.special_ids if codec.token_bytes(token) in wanted)


class TextAssembler:
    """Bytes of tokens to text: holds an unfinished character back, replaces what is none."""

    def __init__(
        self,
        codec: TokenBytes,
        skip_special_tokens: bool,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`shown`: special tokens that are not skipped."""
        self._token_bytes = codec.token_bytes
        self._skipped = codec.special_ids - shown if skip_special_tokens else frozenset[int]()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = codec.strip_leading

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decode(self._token_bytes(token_id))
        return self._without_leading(text) if self._strip and text else text

    def flush(self) -> str:
        return self._decode(b"", True)

    def _without_leading(self, text: str) -> str:
        spaces, self._strip = self._strip, 0
        kept = text.lstrip(" ")
        return text[min(len(text) - len(kept), spaces) :]


class Detokenizer:
    """Text of one stream, with its stop strings.

    `push` and `flush` return what may be shown now; all of it together is the decoded text, cut at
    the stop string that is complete first. Nothing that may still become a stop string is shown.
    Stop strings are looked for in the text of the tokens after the first `min_tokens`.
    """

    def __init__(
        self,
        codec: TokenBytes,
        prompt_tail_tokens: Iterable[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.stopped: str | None = None
        self._assembler = TextAssembler(codec, skip_special_tokens, shown)
        for token_id in prompt_tail_tokens:
            self._assembler.push(token_id)
        self._stop = tuple(filter(None, stop))  # an empty one would end each answer unsaid
        self._first_chars = frozenset(text[0] for text in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._unchecked_tokens = min_tokens
        self._held = ""

    def push(self, token_id: int) -> str:
        """Text that this token makes showable. Tokens after the stop string are ignored."""
        if self.stopped is not None:
            return ""
        text = self._assembler.push(token_id)
        if not self._stop:
            return text
        if self._unchecked_tokens > 0:
            self._unchecked_tokens -= 1
            return text
        return self._checked(text) if text else ""

    def flush(self) -> str:
        """What was held back, at the end of the stream. An unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._assembler.flush()
        if self._stop and text:
            text = self._checked(text)
        held, self._held = self._held, ""
        return text + held

    def _checked(self, new: str) -> str:
        text = self._held + new
        found = self._first_complete(text, len(self._held))
        if found is not None:
            start, stop = found
            self.stopped, self._held = stop, ""
            return text[: start + len(stop)] if self._include_stop else text[:start]
        safe = self._held_from(text)
        self._held = text[safe:]
        return text[:safe]

    def _first_complete(self, text: str, known: int) -> tuple[int, str] | None:
        """The stop string that ends first, of those the longest: as if characters came singly."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            # What was held before holds no complete stop string, so an earlier match ends in `new`.
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = start + len(stop), start, stop
        return None if best is None else (best[1], best[2])

    def _held_from(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return start
        return len(text)
