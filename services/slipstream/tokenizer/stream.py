"""One stream's journal and text: what was asked, which tokens came, what each of them shows."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from slipstream.core.machine import Effect, Send
from slipstream.core.prefix import extend_hashes, namespace
from slipstream.core.submission import digest
from slipstream.errors import Problem
from slipstream.messages import (
    Part,
    Seek,
    Sought,
    StreamAck,
    Submit,
    TextDelta,
    TextLogprob,
    Tokenize,
    Tokenized,
    TokenSpan,
)
from slipstream.tokenizer.detokenizer import (
    PROMPT_TAIL_TOKENS,
    Detokenizer,
    TokenBytes,
    spelled,
)
from slipstream.tokenizer.formats.parser import Parser, merged
from slipstream.tokenizer.formats.tool_formats import markers, parser
from slipstream.types import (
    ATTEMPTS_PER_OWNER,
    BlockHash,
    FinishReason,
    NodeId,
    SamplingParams,
    TokenLogprobs,
    Usage,
    pack_tokens,
)


class Encoding(NamedTuple):
    """What became of a prompt, as `core.machine.Encoded`."""

    prompt: list[int]
    grammar: str = ""
    bad_tokens: tuple[tuple[int, ...], ...] = ()
    answer_format: str = ""


_NOT_YET = Encoding([])


def sought(stream: "Stream | None", message: Seek) -> Sought:
    """What to say to a frontend that looks for it."""
    if stream is None or stream.cancelled or digest(stream.submission) != message.digest:
        return Sought(request_id=message.request_id)
    return Sought(request_id=message.request_id, attempt=max(stream.attempt, stream.floor))


def acknowledged(worker: NodeId, span: TokenSpan) -> list[Effect]:
    """The worker may forget what it sent, as nobody will ask for it again."""
    if span.finish_reason is None:
        return []
    return [Send(worker, StreamAck(request_id=span.request_id, attempt=span.attempt))]


class Stream:
    """A request as it lives in the tokenizer.

    `prompt` is empty until it is encoded. `tokens` are all output tokens, those that another
    tokenizer had accepted included; `texts` holds what each of them made showable, or `parts` if
    the answer is told apart, so that any of it can be said again.
    """

    def __init__(
        self,
        submission: Tokenize,
        frontend: NodeId,
        accepted: list[int],
        codec: TokenBytes,
        eos_token_ids: frozenset[int],
        deadline_s: float,
    ) -> None:
        self.submission = submission
        self.request_id = submission.request_id
        self.frontend = frontend
        self.attempt = submission.attempt
        self.floor = submission.attempt
        """What the frontend asked for: it listens to no lower one."""
        self.deadline_s = deadline_s
        self.sampling: SamplingParams = submission.sampling
        self.encoding = _NOT_YET
        self.tokens: list[int] = accepted
        self.texts: list[str] = []
        self.parts: list[tuple[Part, ...]] = []
        self.logprobs: list[TextLogprob] = []
        self.prompt_logprobs: list[TextLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.problem: Problem | None = None
        """Why it failed, if it did."""
        self.cancelled = False
        self.orphaned_at_s: float | None = None
        self.gap_worker: NodeId | None = None
        """Who was asked to say tokens again, until they come."""
        self.ask_again_at_s = 0.0
        self.ended_at_s = 0.0
        self._codec = codec
        self._eos_token_ids = eos_token_ids
        self._tail = ""
        """What was held back until the end."""
        self._tail_parts: list[Part] = []
        self._parser: Parser | None = None
        self._cached_tokens: int | None = None
        self._path = self._path_told = self._decision = ""
        self._hashes: list[BlockHash] = []
        self._space = b""
        self._submitted = 0
        """The last attempt that was submitted."""
        self._ends: list[int] = []
        """Where deltas end, in tokens, so that they can be said again as they were."""
        self._end_said = False
        """With the last of them; else the end comes by itself."""

    @property
    def prompt(self) -> list[int]:
        return self.encoding.prompt

    @property
    def encoded(self) -> bool:
        return bool(self.prompt)

    @property
    def owner(self) -> int:
        """How many frontends have taken it over."""
        return self.floor // ATTEMPTS_PER_OWNER

    @property
    def submitted_bytes(self) -> int:
        """About as many as a submission has: ids, their hashes, and the grammar."""
        return 5 * (len(self.prompt) + len(self.tokens)) + len(self.sampling.grammar)

    def begin(self, encoding: Encoding, sampling: SamplingParams) -> None:
        """The prompt is known: go through the accepted tokens, which may already be the end."""
        self.encoding = encoding
        self.sampling = sampling = msgspec.structs.replace(
            sampling, grammar=encoding.grammar, bad_tokens=encoding.bad_tokens
        )
        shown: frozenset[int] = frozenset()
        if self.submission.parse:
            self._parser = parser(encoding.answer_format)
            shown = spelled(self._codec, markers(encoding.answer_format))
        self._detokenizer = Detokenizer(
            self._codec,
            encoding.prompt[-PROMPT_TAIL_TOKENS:],
            sampling.stop,
            sampling.include_stop_str_in_output,
            sampling.skip_special_tokens,
            sampling.min_tokens,
            shown,
        )
        accepted, self.tokens = self.tokens, []
        self._push(accepted, (), None)
        self._ends = [*range(1, len(self.tokens) + 1)]
        if self.finish_reason is None and self.tokens:
            last = self.tokens[-1]
            if self._stops(last):
                self._finish(FinishReason.STOP, last)
            elif len(self.tokens) >= sampling.max_tokens:
                self._finish(FinishReason.LENGTH, None)

    def take(self, span: TokenSpan, tokens: list[int]) -> TextDelta | None:
        """What a span of this attempt brings, if it brings anything. `span.position` is not past
        our end."""
        start = len(self.tokens)
        known = start - span.position
        if self._cached_tokens is None:
            self._cached_tokens = span.cached_tokens
        self._path = span.path or self._path
        self._decision = span.decision or self._decision
        if span.prompt_logprobs is not None and not start:
            first = TokenLogprobs(self.prompt[0], math.nan)
            self.prompt_logprobs = [*map(self._with_text, (first, *span.prompt_logprobs))]
        self._push(tokens[known:], (span.logprobs or ())[known:], span.stop_token)
        ends = span.finish_reason is not None and span.position + len(tokens) == len(self.tokens)
        if ends and self.finish_reason is None and span.finish_reason is not None:
            self._finish(span.finish_reason, span.stop_token)
        if len(self.tokens) == start and self.finish_reason is None:
            return None
        self._ends.append(len(self.tokens))
        self._end_said = self.finish_reason is not None
        return self._delta(start, len(self.tokens), last=self.finish_reason is not None)

    def again(self, position: int) -> list[TextDelta]:
        """Everything from `position` on, in the deltas that were said before, so that a frontend
        that knows some of it can skip exactly that, and one that takes it over makes of it what the
        one before did. What another tokenizer had accepted comes token by token."""
        ends = self._ends[bisect_right(self._ends, position) :]
        over = self.finish_reason is not None
        if over and not (ends and self._end_said):
            ends.append(len(self.tokens))
        starts = [position, *ends]
        last = len(ends) - 1 if over else -1
        return [
            self._delta(start, end, last=i == last)
            for i, (start, end) in enumerate(zip(starts, ends, strict=False))
        ]

    def tokenized(self) -> Tokenized:
        return Tokenized(request_id=self.request_id, prompt_tokens=len(self.prompt))

    def submit(self, kv_layout_id: str, now_s: float) -> Submit:
        """To run from here on. Without a layout nobody could hold the blocks: no hashes. Nor are
        there any where all of the prompt is computed in any case."""
        salt = self.submission.salt
        space = namespace(kv_layout_id, salt, self.submission.adapter)
        if space != self._space:
            self._space, self._hashes = space, []
        if kv_layout_id and self.sampling.prompt_logprobs is None:
            extend_hashes(self._hashes, self.prompt + self.tokens, space)
        repeated, self._submitted = self._submitted == self.attempt, self.attempt
        return Submit(
            request_id=self.request_id,
            attempt=self.attempt,
            repeated=repeated,
            prompt=pack_tokens(self.prompt),
            accepted=pack_tokens(self.tokens),
            sampling=self.sampling,
            timeout_s=max(0.0, self.deadline_s - now_s),
            model=self.submission.model,
            adapter=self.submission.adapter,
            salt=salt,
            block_hashes=b"".join(self._hashes),
            priority=self.submission.priority,
            tenant=self.submission.tenant,
            weight=self.submission.weight,
            owner=self.owner,
        )

    def check(self) -> None:
        if self.encoded:
            assert len(self.parts if self.submission.parse else self.texts) == len(self.tokens)
            assert len(self.tokens) <= self.sampling.max_tokens or self.finish_reason is not None
        if self.sampling.logprobs is not None:
            assert len(self.logprobs) == (len(self.tokens) if self.encoded else 0)
        assert self.problem is None or self.finish_reason is None

    def _stops(self, token: int) -> bool:
        """For tokens that come without a worker's word; the token is the last one."""
        return self.sampling.stops(token, len(self.tokens), self._eos_token_ids)

    def _push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], stop_token: int | None
    ) -> None:
        """Up to the end of `tokens`, or of the token that completes a stop string."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            ends = self._stops(token) or (token == stop_token and i == len(tokens) - 1)
            silent = ends and not self.sampling.include_stop_str_in_output
            text = "" if silent else self._detokenizer.push(token)
            if self._parser is None:
                self.texts.append(text)
            else:
                self.parts.append(tuple(self._parser.push(text)))
            if self.sampling.logprobs is not None:
                given = logprobs[i] if i < len(logprobs) else TokenLogprobs(token, math.nan)
                self.logprobs.append(self._with_text(given))
            if self._detokenizer.stopped is not None:
                self._finish(FinishReason.STOP, None)
                return

    def _finish(self, reason: FinishReason, stop_token: int | None) -> None:
        self._tail = self._detokenizer.flush()
        if self._parser is not None:
            self._tail_parts = self._parser.push(self._tail) + self._parser.end()
        self.finish_reason = reason
        if self._detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._detokenizer.stopped
        elif reason is FinishReason.STOP and stop_token in self.sampling.stop_token_ids:
            self.stop_reason = stop_token

    def _delta(self, start: int, end: int, *, last: bool) -> TextDelta:
        """Tokens [start, end) and their text; the last one with the end of the stream."""
        path = self._path if last or self._path != self._path_told else ""
        self._path_told = path or self._path_told
        wants = self.sampling.logprobs is not None
        text, parts = "", list[Part]()
        if self._parser is None:
            text = "".join(self.texts[start:end]) + (self._tail if last else "")
        else:
            said = itertools.chain.from_iterable(self.parts[start:end])
            parts = merged([*said, *(self._tail_parts if last else ())])
        return TextDelta(
            request_id=self.request_id,
            attempt=max(self.attempt, self.floor),
            position=start,
            tokens=pack_tokens(self.tokens[start:end]),
            text=text,
            parts=parts,
            logprobs=self.logprobs[start:end] if wants else None,
            prompt_logprobs=None if start else self.prompt_logprobs or None,
            finish_reason=self.finish_reason if last else None,
            stop_reason=self.stop_reason if last else None,
            usage=self._usage() if last else None,
            path=path,
            decision=self._decision if path else "",
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            cached_tokens=self._cached_tokens or 0,
        )

    def _with_text(self, entry: TokenLogprobs) -> TextLogprob:
        return self._text_logprob(
            entry.token_id,
            entry.logprob,
            tuple(self._text_logprob(token_id, logprob) for token_id, logprob in entry.top),
        )

    def _text_logprob(
        self, token_id: int, logprob: float, top: tuple[TextLogprob, ...] = ()
    ) -> TextLogprob:
        raw = self._codec.token_bytes(token_id)
        return TextLogprob(token_id, raw.decode("utf-8", "replace"), raw, logprob, top)
