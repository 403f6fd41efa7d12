"""One answer of a chat for a person who watches: its text as it comes, then its numbers."""

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import msgspec

from slipstream.cli.client_config import ChatConfig, RunConfig
from slipstream.client.api import Api
from slipstream.client.stream import AnswerError, Meter

Message = dict[str, str]
_KEPT = "\n\t"
_PLAIN, _DIM = ("", ""), ("\x1b[2m", "\x1b[0m")


class Sampling(msgspec.Struct, kw_only=True):
    """What a person may set. None is not sent, and the model's own value holds."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, config: RunConfig | ChatConfig) -> "Sampling":
        return cls(
            temperature=None if config.temperature < 0 else config.temperature,
            max_tokens=config.max_tokens or None,
            seed=None if config.seed < 0 else config.seed,
        )

    def sent(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.structs.asdict(self)
        return {name: value for name, value in found.items() if value is not None}


class Answer(msgspec.Struct, kw_only=True):
    """Fills up while it is streamed; whole or not, what is there is true."""

    model: str = ""
    id: str = ""
    text: str = ""
    reasoning: str = ""
    """What the model thought before it."""
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0
    """After the first one; 0: there was one alone."""
    path: str = ""
    """The workers that made it, as Slipstream says."""

    def numbers(self) -> str:
        """In one line."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        said = [
            f"first token {self.ttft_s * 1e3:.0f} ms",
            f"{self.output_tokens} token{'s' * (self.output_tokens != 1)}",
            f"{self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else "",
            f"prompt {self.prompt_tokens}{cached}",
            self.path,
            self.finish_reason,
        ]
        return " · ".join(word for word in said if word)


class Screen:
    """An answer as it comes, on stdout; what the model thinks before it is dim, on stderr, so that
    a pipe gets the answer alone."""

    def __init__(self) -> None:
        self._open: TextIO | None = None
        """Where the last line has no end yet."""

    def say(self, piece: str) -> None:
        self._put(sys.stdout, piece, *_PLAIN)

    def think(self, piece: str) -> None:
        self._put(sys.stderr, piece, *_DIM)

    def end(self) -> None:
        if self._open is not None:
            print(file=self._open, flush=True)
        self._open = None

    def _put(self, stream: TextIO, piece: str, before: str, after: str) -> None:
        if self._open is not stream:
            self.end()
        text = f"{before}{printable(piece)}{after}" if stream.isatty() else piece
        print(text, end="", file=stream, flush=True)
        self._open = None if piece.endswith("\n") else stream


async def follow(
    api: Api,
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    answer: Answer,
    screen: Screen | None = None,
) -> None:
    """Fills `answer`, and shows each piece of it. AnswerError: it did not end well; what has come
    stays."""
    body = {"model": model, "messages": list(messages), **sampling.sent()}
    meter = Meter(time.perf_counter())
    answer.model = model
    stream = api.stream("/v1/chat/completions", body, meter)
    async with contextlib.aclosing(stream):
        async for choices in stream:
            for choice in choices:
                answer.text += choice.content
                answer.reasoning += choice.reasoning
                if screen is not None and choice.reasoning:
                    screen.think(choice.reasoning)
                if screen is not None and choice.content:
                    screen.say(choice.content)
            answer.ttft_s = meter.first_s
    _finish(answer, meter, api)


def _finish(answer: Answer, meter: Meter, api: Api) -> None:
    if not meter.finish_reason:
        raise AnswerError("the answer ended without a reason")
    answer.id, answer.finish_reason = meter.id, meter.finish_reason
    answer.path = api.headers.get("x-slipstream-path", "")
    if meter.usage is not None:
        answer.prompt_tokens = meter.usage.prompt_tokens
        answer.cached_tokens = meter.usage.cached_tokens
        answer.output_tokens = meter.usage.completion_tokens
    if meter.tokens > 1 and meter.last_s > meter.first_s:
        answer.tokens_per_s = 1 / meter.tpot_s


def printable(text: str) -> str:
    """For a terminal: a model must not be able to move its cursor or set its title."""
    return "".join(
        c if c.isprintable() or c in _KEPT else "\N{REPLACEMENT CHARACTER}" for c in text
    )
