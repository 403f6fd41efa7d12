"""The tokenizer's machine: owner of every stream's journal and text.

A stream goes: `Tokenize` -> encoded in a thread -> `Submit` -> spans of tokens -> deltas of text ->
ended, and for a while remembered, so that a frontend that lost our last words can ask again.
"""

from collections import Counter, deque
from typing import TypeAlias

import msgspec

from slipstream.core.machine import (
    Drain,
    Effect,
    Encoded,
    EncodePrompt,
    Event,
    Exit,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from slipstream.core.membership import Membership
from slipstream.core.submission import TAKEN
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    SCHEDULER,
    Cancel,
    Codec,
    Failed,
    NodeInfo,
    Resend,
    Resume,
    Seek,
    StreamEnded,
    TextDelta,
    TextOut,
    Tokenize,
    TokensOut,
    TokenSpan,
)
from slipstream.tokenizer import admission
from slipstream.tokenizer.admission import LATE, Limits, unusable
from slipstream.tokenizer.codec_calls import CodecCalls
from slipstream.tokenizer.detokenizer import TokenBytes
from slipstream.tokenizer.settings import TokenizerSettings
from slipstream.tokenizer.stream import Encoding, Stream, acknowledged, sought
from slipstream.types import ATTEMPTS_PER_OWNER, NodeId, RequestId, unpack_tokens

TICK_TIMER = "tick"
TICK_S = 0.5
EXIT_LINGER_S = 1.0
"""After the last stream's end, so that its last words leave the process."""
SUBMIT_BATCH_BYTES = 16 << 20
"""How much is said to a scheduler that comes back before it has had time to read."""

Deltas: TypeAlias = dict[NodeId, list[TextDelta]]


class TokenizerMachine:
    def __init__(self, node: NodeInfo, settings: TokenizerSettings, codec: TokenBytes) -> None:
        self.settings = settings
        self.membership = Membership(node)
        self._model, self._codec = node.model, codec
        self._calls = CodecCalls(codec, settings.max_codec_calls, settings.max_codec_tokens)
        self._live: dict[RequestId, Stream] = {}
        self._ended: dict[RequestId, Stream] = {}
        """In the order of their ends."""
        self._unsubmitted: deque[RequestId] = deque()
        self._ticking = False
        self._draining = False
        self._exited = False
        self._last_end_s = float("-inf")
        self._counts: Counter[str] = Counter()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = self.membership.handle(event, now_s)
        match event:
            case Received(source, message):
                effects += self._received(source, message, now_s)
            case Encoded(key, tokens, problem):
                if self._calls.owns(key):
                    effects += self._calls.encoded(key, tokens, problem)
                else:
                    effects += self._encoded(event, now_s)
            case PeerUp(peer, _) if peer == SCHEDULER:
                self._unsubmitted = deque(s.request_id for s in self._live.values() if s.encoded)
                effects += self._submit_batch(now_s)
            case PeerDown(peer):
                for stream in self._live.values():
                    if stream.frontend == peer and stream.orphaned_at_s is None:
                        stream.orphaned_at_s = now_s
                self._calls.forget(peer)
            case Drain():
                self._draining = True
                effects += self.membership.drain(now_s)
            case TimerFired(key) if key == TICK_TIMER:
                self._ticking = False
                effects += self._tick(now_s)
        if not self._ticking and (
            self._live or self._ended or (self._draining and not self._exited)
        ):
            self._ticking = True
            effects.append(SetTimer(TICK_TIMER, now_s + TICK_S))
        if self._done(now_s):
            self._exited = True
            effects.append(Exit())
        return effects

    def limits(self) -> Limits:
        nodes = [node for node in self.membership.taking_part() if node.model == self._model]
        return admission.limits(nodes, self.settings.max_model_len)

    def statistics(self) -> dict[str, float]:
        return {
            "streams_live": float(len(self._live)),
            "streams_encoding": sum(not stream.encoded for stream in self._live.values()),
            "streams_orphaned": sum(s.orphaned_at_s is not None for s in self._live.values()),
            "streams_ended": len(self._ended),
            "codec_calls": len(self._calls),
        } | {f"{name}_total": count for name, count in self._counts.items()}

    def check(self) -> None:
        assert not self._live.keys() & self._ended.keys()
        assert len(self._live) <= self.settings.max_streams
        assert len(self._ended) <= self.settings.max_streams
        for stream in self._live.values():
            assert stream.finish_reason is None and stream.problem is None
            assert not stream.cancelled
            stream.check()
        for stream in self._ended.values():
            assert stream.cancelled or stream.problem or stream.finish_reason is not None
            stream.check()
        assert self._ticking or not self._live
        self._calls.check()

    # --- Messages ---

    def _received(self, source: NodeId, message: object, now_s: float) -> list[Effect]:
        match message:
            case Tokenize():
                return self._tokenize(source, message, now_s)
            case TokensOut(spans=spans):
                return self._tokens(source, spans, now_s)
            case Resume(request_id=request_id, attempt=attempt):
                return self._resume(request_id, attempt, now_s)
            case Cancel(request_id=request_id):
                stream = self._live.get(request_id)
                if stream is None or stream.frontend != source:
                    return []
                return self._cancel(stream, now_s)
            case Failed(request_id=request_id, problem=problem):
                stream = self._live.get(request_id)
                return [] if stream is None else self._fail(stream, problem, now_s)
            case Seek(request_id=request_id):
                return [Send(source, sought(self._known(request_id), message))]
            case Codec():
                return self._calls.ask(source, message)
        return []

    def _known(self, request_id: RequestId) -> Stream | None:
        return self._live.get(request_id) or self._ended.get(request_id)

    def _tokenize(self, source: NodeId, message: Tokenize, now_s: float) -> list[Effect]:
        if message.model != self._model:
            return self._refuse(source, message, admission.not_ours(message.model, self._model))
        known = self._known(message.request_id)
        owner = message.attempt // ATTEMPTS_PER_OWNER
        if known is not None and (owner, source) != (known.owner, known.frontend):
            if owner <= known.owner:
                return self._refuse(source, message, TAKEN)
            taken = self._taken(known, source, message.attempt, now_s)
            return taken + self._tokenize(source, message, now_s)
        try:
            accepted = unpack_tokens(message.accepted)
        except ValueError:
            return self._refuse(source, message, unusable("The accepted tokens are torn."))
        if known is None:
            return self._open(source, message, accepted, now_s)
        # The scheduler may have raised our attempt without the frontend having heard of it, so that
        # a lower one says no more than that a session was lost.
        continues = known.tokens[: len(accepted)] == accepted and not known.cancelled
        if message.attempt <= max(known.attempt, known.floor) and continues:
            return self._say_again(known, len(accepted))
        # A new attempt, or other tokens than ours: what workers still send of the old one is void.
        attempt = max(message.attempt, known.attempt + 1)
        del (self._live if message.request_id in self._live else self._ended)[message.request_id]
        self._counts["restarts"] += 1
        renewed = msgspec.structs.replace(message, attempt=attempt)
        return self._open(source, renewed, accepted, now_s, known.encoding)

    def _taken(self, stream: Stream, frontend: NodeId, attempt: int, now_s: float) -> list[Effect]:
        """Another frontend has it from now on. It goes on as the attempt that it is; the scheduler
        hears of it, so that the one before can move it nowhere."""
        self._counts["taken_over"] += 1
        before, stream.frontend, stream.floor = stream.frontend, frontend, attempt
        told = Send(before, Failed(request_id=stream.request_id, problem=TAKEN))
        live = stream.request_id in self._live and stream.encoded
        submitted = self._submit(stream, now_s) if live else []
        return submitted if before == frontend else [told, *submitted]

    def _open(
        self,
        source: NodeId,
        message: Tokenize,
        accepted: list[int],
        now_s: float,
        encoding: Encoding | None = None,
    ) -> list[Effect]:
        if len(self._live) >= self.settings.max_streams:
            text = f"All {self.settings.max_streams} streams of the tokenizer are in use."
            full = Problem(code=ErrorCode.QUEUE_FULL, message=text, retry_after_s=1.0)
            return self._refuse(source, message, full)
        ends = self.settings.eos_token_ids, now_s + message.timeout_s
        stream = Stream(message, source, accepted, self._codec, *ends)
        self._live[stream.request_id] = stream
        self._counts["streams"] += 1
        if encoding is not None and encoding.prompt:
            return self._begin(stream, encoding, now_s)
        asked = message.constraint, message.bad_words, message.parse, stream.deadline_s
        return [EncodePrompt(stream.request_id, message.prompt, *asked)]

    def _say_again(self, stream: Stream, position: int) -> list[Effect]:
        stream.orphaned_at_s = None
        if stream.problem is not None:
            failed = Failed(request_id=stream.request_id, problem=stream.problem)
            return [Send(stream.frontend, failed)]
        if not stream.encoded:
            return []
        self._counts["resyncs"] += 1
        effects: list[Effect] = [Send(stream.frontend, stream.tokenized())]
        if deltas := stream.again(position):
            effects.append(Send(stream.frontend, TextOut(deltas=deltas)))
        return effects

    def _resume(self, request_id: RequestId, attempt: int, now_s: float) -> list[Effect]:
        stream = self._live.get(request_id)
        if stream is None:
            return [Send(SCHEDULER, StreamEnded(request_id=request_id))]
        if attempt > stream.attempt:
            self._counts["resumes"] += 1
            stream.attempt = attempt
            stream.gap_worker = None
        return [self._submission(stream, now_s)] if stream.encoded else []

    # --- From a prompt to a submission ---

    def _encoded(self, event: Encoded, now_s: float) -> list[Effect]:
        stream = self._live.get(event.request_id)
        if stream is None or stream.encoded:
            return []
        problem = event.problem
        if now_s >= stream.deadline_s:
            return self._fail(stream, LATE, now_s)  # while it was waited for
        if not event.tokens:
            problem = problem or unusable("The prompt has no tokens.")
        elif problem and problem.code is ErrorCode.QUEUE_FULL and stream.tokens:
            problem = None  # no time for its grammar; who took these tokens before us had some
        if problem is not None:
            return self._fail(stream, problem, now_s)
        encoding = Encoding(
            list(event.tokens), event.grammar, event.bad_tokens, event.answer_format
        )
        return self._begin(stream, encoding, now_s)

    def _begin(self, stream: Stream, encoding: Encoding, now_s: float) -> list[Effect]:
        prompt = encoding.prompt
        limits = self.limits()
        if problem := admission.unknown_token(prompt + stream.tokens, limits.vocab_size):
            return self._fail(stream, problem, now_s)
        count = len(stream.tokens)
        sampling = admission.granted(stream.submission, len(prompt), count, limits)
        if isinstance(sampling, Problem):
            return self._fail(stream, sampling, now_s)
        self._counts["prompts"] += 1
        self._counts["prompt_tokens"] += len(prompt)
        replayed = len(stream.tokens)
        stream.begin(encoding, sampling)
        tokenized = Send(stream.frontend, stream.tokenized())
        if stream.finish_reason is None:
            return [*self._submit(stream, now_s), tokenized]  # what is waited for goes first
        text = Send(stream.frontend, TextOut(deltas=stream.again(replayed)))
        return [tokenized, text, *self._end(stream, now_s)]

    def _submit(self, stream: Stream, now_s: float) -> list[Effect]:
        """A scheduler that is away gets all live streams as soon as it is back."""
        return [self._submission(stream, now_s)] if self.membership.scheduler_up else []

    def _submission(self, stream: Stream, now_s: float) -> Send:
        return Send(SCHEDULER, stream.submit(self.limits().kv_layout_id, now_s))

    def _submit_batch(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        num_bytes = 0
        while self._unsubmitted and num_bytes < SUBMIT_BATCH_BYTES:
            stream = self._live.get(self._unsubmitted.popleft())
            if stream is not None and stream.encoded and self.membership.scheduler_up:
                effects.append(self._submission(stream, now_s))
                num_bytes += stream.submitted_bytes
        return effects

    # --- Tokens ---

    def _tokens(self, source: NodeId, spans: list[TokenSpan], now_s: float) -> list[Effect]:
        deltas: Deltas = {}
        effects: list[Effect] = []
        for span in spans:
            effects += self._span(source, span, deltas, now_s)
        said = [Send(frontend, TextOut(deltas=items)) for frontend, items in deltas.items()]
        return [*said, *effects]

    def _span(self, source: NodeId, span: TokenSpan, deltas: Deltas, now_s: float) -> list[Effect]:
        stream = self._live.get(span.request_id)
        if stream is None or span.attempt < stream.attempt:
            return acknowledged(source, span)
        if span.attempt > stream.attempt or not stream.encoded:
            return []
        try:
            tokens = unpack_tokens(span.tokens)
        except ValueError:
            self._counts["spans_malformed"] += 1
            return []
        have = len(stream.tokens)
        if span.position > have:
            if stream.gap_worker is not None:
                return []
            return [self._ask_again(stream, source, now_s)]
        delta = stream.take(span, tokens)
        if delta is None:
            return []
        deltas.setdefault(stream.frontend, []).append(delta)
        self._counts["tokens"] += len(stream.tokens) - have
        stream.gap_worker = None
        if stream.finish_reason is None:
            return []
        return acknowledged(source, span) + self._end(stream, now_s)

    def _ask_again(self, stream: Stream, worker: NodeId, now_s: float) -> Send:
        self._counts["resends"] += 1
        stream.gap_worker = worker
        stream.ask_again_at_s = now_s + self.settings.resend_after_s
        return Send(
            worker,
            Resend(
                request_id=stream.request_id, attempt=stream.attempt, position=len(stream.tokens)
            ),
        )

    # --- Ends ---

    def _tick(self, now_s: float) -> list[Effect]:
        effects = self._submit_batch(now_s)
        for stream in list(self._live.values()):
            orphaned_at_s = stream.orphaned_at_s
            if now_s >= stream.deadline_s:
                effects += self._fail(stream, LATE, now_s)
            elif orphaned_at_s is not None and (
                now_s >= orphaned_at_s + self.settings.orphan_grace_s
            ):
                effects += self._cancel(stream, now_s)
            elif stream.gap_worker is not None and now_s >= stream.ask_again_at_s:
                effects.append(self._ask_again(stream, stream.gap_worker, now_s))
        for request_id, stream in list(self._ended.items()):
            if now_s < stream.ended_at_s + self.settings.ended_keep_s:
                break
            del self._ended[request_id]
        return effects

    def _fail(self, stream: Stream, problem: Problem, now_s: float) -> list[Effect]:
        stream.problem = problem
        self._counts[f"failed_{problem.code.value}"] += 1
        failed = Failed(request_id=stream.request_id, problem=problem)
        return [Send(stream.frontend, failed), *self._end(stream, now_s)]

    def _cancel(self, stream: Stream, now_s: float) -> list[Effect]:
        stream.cancelled = True
        self._counts["cancelled"] += 1
        return self._end(stream, now_s)

    def _end(self, stream: Stream, now_s: float) -> list[Effect]:
        """However it has ended, the scheduler learns it here: some attempt may still run."""
        del self._live[stream.request_id]
        if len(self._ended) >= self.settings.max_streams:
            del self._ended[next(iter(self._ended))]
        stream.ended_at_s = self._last_end_s = now_s
        self._ended[stream.request_id] = stream
        return [Send(SCHEDULER, StreamEnded(request_id=stream.request_id))]

    def _refuse(self, source: NodeId, message: Tokenize, problem: Problem) -> list[Effect]:
        self._counts[f"failed_{problem.code.value}"] += 1
        return [Send(source, Failed(request_id=message.request_id, problem=problem))]

    def _done(self, now_s: float) -> bool:
        waits = self._live or self._calls or now_s < self._last_end_s + EXIT_LINGER_S
        return self._draining and not self._exited and not waits
