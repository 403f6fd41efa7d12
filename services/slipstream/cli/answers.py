"""One answer of a chat for a person who watches: its text as it comes, then its numbers."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from slipstream.cli.client_config import ChatConfig, RunConfig
from slipstream.client.api import Api
from slipstream.client.stream import AnswerError, Meter

Message = dict[str, str]
_KEPT = "\n\t"


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


async def follow(
    api: Api,
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    answer: Answer,
    show: Callable[[str], None],
) -> None:
    """Fills `answer`, and hands each piece of its text to `show`. AnswerError: it did not end
    well; what has come stays."""
    body = {"model": model, "messages": list(messages), **sampling.sent()}
    meter = Meter(time.perf_counter())
    answer.model = model
    stream = api.stream("/v1/chat/completions", body, meter)
    async with contextlib.aclosing(stream):
        async for choices in stream:
            for choice in choices:
                if choice.content:
                    answer.text += choice.content
                    show(choice.content)
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
