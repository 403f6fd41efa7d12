"""One request, from its headers to its end: what it uses is counted as it goes, and what the audit
log says of it is known when it is over."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slipstream.errors import ErrorCode
from slipstream.frontend.audit import Line
from slipstream.frontend.usage import Kind
from slipstream.messages import TextDelta
from slipstream.types import count_tokens

if TYPE_CHECKING:
    from slipstream.frontend.callers import Caller


class Trail:
    __slots__ = (
        *("_caller", "_seen", "answer_id", "begun_s", "cached_tokens", "completion_tokens"),
        *("error", "first_s", "goes_on", "model", "path", "prompt_tokens", "reasons"),
    )

    def __init__(self, caller: "Caller", begun_s: float) -> None:
        self._caller, self.begun_s = caller, begun_s
        self._seen: list[int] = []
        self.model = self.answer_id = self.path = ""
        """Of the answer: the model as it was asked for, and the workers that make it."""
        self.error: ErrorCode | None = None
        self.reasons: list[str] = []
        """Why its choices have ended."""
        self.first_s: float | None = None
        self.goes_on = False
        """It was begun, and counted as a request, at another frontend."""
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0

    def begin(self, answer_id: str, model: str, seen: Sequence[int] | None) -> None:
        """An answer is asked for. `seen`: tokens of each choice that the client has from another
        frontend, which has counted them, and the prompt; None: it is new."""
        self.answer_id, self.model = answer_id, model
        self.goes_on, self._seen = seen is not None, list(seen or ())
        if not self.goes_on:
            self._caller.named(model)

    def prompt(self, tokens: int) -> None:
        if not self.goes_on:
            self.prompt_tokens += tokens
            self._caller.spend(self.model, Kind.PROMPT_TOKENS, tokens)

    def made(self, choice: int, delta: TextDelta, *, first: bool) -> None:
        """`first`: of the choices that share a prompt."""
        tokens = count_tokens(delta.tokens)
        if self.goes_on:
            tokens -= min(tokens, max(0, self._seen[choice] - delta.position))
        if tokens:
            if self.first_s is None:
                self.first_s = self._caller.clock()
            self.completion_tokens += tokens
            self._caller.spend(self.model, Kind.COMPLETION_TOKENS, tokens)
        if first and delta.usage is not None and not self.goes_on:
            self.cached_tokens += delta.usage.cached_tokens
            self._caller.spend(self.model, Kind.CACHED_TOKENS, delta.usage.cached_tokens)

    def tell(self, line: Line) -> Line:
        """Puts what is known of the answer into a line of the audit log."""
        line.answer_id, line.model, line.goes_on = self.answer_id, self.model, self.goes_on
        line.error = line.error or self.error or ""
        line.finish_reasons, line.workers = self.reasons, self.path
        line.prompt_tokens, line.cached_tokens = self.prompt_tokens, self.cached_tokens
        line.completion_tokens = self.completion_tokens
        if self.first_s is not None:
            line.ttft_ms = round(1000 * (self.first_s - self.begun_s), 1)
        return line
