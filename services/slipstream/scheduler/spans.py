"""What the scheduler tells of a request, and its answer to who asks for a whole trace.

schedule = queued (locate), run (first token), and the same again after a lost worker
"""

import math
from collections.abc import Callable

import msgspec

from slipstream.core.machine import Exit, ExportTrace, Received, Send, SetTimer, TimerFired
from slipstream.core.prefix import HASH_BYTES
from slipstream.core.span_recorder import SpanRecorder
from slipstream.messages import (
    AttemptFailed,
    Decode,
    Failed,
    FindTrace,
    Finished,
    FirstToken,
    Locate,
    Located,
    Resume,
    Spans,
    StreamEnded,
    Submit,
    TraceFound,
)
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.request import State
from slipstream.scheduler.trace_store import TraceStore
from slipstream.spans import Attributes, RequestSpans, Trace
from slipstream.types import NodeId, RequestId, Role, count_tokens

EXPORT_TIMER = "export spans"


class SchedulerSpans(SpanRecorder):
    """Reads of the machine which requests it has, and what it decided."""

    def __init__(
        self, machine: SchedulerMachine, wall_offset_ns: Callable[[], int], *, exports: bool = False
    ) -> None:
        """`exports`: emit `ExportTrace`."""
        super().__init__(machine.node, wall_offset_ns)
        self.store = TraceStore(exports)
        self._machine = machine
        self._scheduler_up = True  # that is us
        self._export_set = False
        self.heard = {
            Submit: self._submitted,
            Located: self._located,
            FirstToken: self._first_token,
            Finished: self._finished,
            StreamEnded: self._stream_ended,
            Spans: self._told,
            FindTrace: self._asked,
        }
        self.happened = {TimerFired: self._timer}
        self.sent = {
            Locate: self._locates,
            Decode: self._places,
            Resume: self._resumes,
            Failed: self._fails,
        }
        self.done = {Exit: self._leaves}

    def tell(self) -> None:
        """To ourselves."""
        self._keep(self.book.take(self.now_s, self._wall_offset_ns()))

    def check(self) -> None:
        super().check()
        self.store.check()

    # --- A request's way --------------------------------------------------------------------------

    def _submitted(self, source: NodeId, submit: Submit) -> None:
        request = self._machine.requests.get(submit.request_id)
        if request is None:
            return
        self._opens(source, submit)
        adopted = request.state is State.DECODING and not self._places_now(submit.request_id)
        said: Attributes = {"attempt": request.attempt}
        if adopted:
            adopted_at: Attributes = {**said, "decode": request.decode or "", "adopted": True}
            self.book.begin(submit.request_id, "run", self.now_s, "schedule", adopted_at)
        elif not self.book.is_open(submit.request_id, "run"):
            self.book.begin(submit.request_id, "queued", self.now_s, "schedule", said)

    def _opens(self, source: NodeId, submit: Submit) -> None:
        said: Attributes = {
            "tokenizer": source,
            "prompt_tokens": count_tokens(submit.prompt),
            "max_tokens": submit.sampling.max_tokens,
        }
        self.book.open(submit.request_id, self.now_s)
        self.book.begin(submit.request_id, "schedule", self.now_s, said=said)

    def _places_now(self, request_id: RequestId) -> bool:
        messages = (e.message for e in self.effects if isinstance(e, Send))
        return any(isinstance(m, Decode) and m.request_id == request_id for m in messages)

    def _locates(self, to: NodeId, message: Locate) -> None:
        said: Attributes = {"peer": to, "blocks": len(message.block_hashes) // HASH_BYTES}
        self.book.begin(message.request_id, "locate", self.now_s, "queued", said)

    def _located(self, source: NodeId, message: Located) -> None:
        said: Attributes = {"found_blocks": max(message.blocks.values(), default=0)}
        self.book.end(message.request_id, "locate", self.now_s, said)

    def _timer(self, event: TimerFired) -> None:
        if event.key == EXPORT_TIMER:
            self._export_set = False
            self._export(self.store.due(self.now_s))
            self._set_export_timer()
        elif event.key == "tick":
            over = [r for r in self.book.live if r not in self._machine.requests]
            for request_id in over:  # its tokenizer stayed silent
                self.book.close(request_id, self.now_s)
        elif event.key.startswith("locate "):
            late: Attributes = {"error.type": "timeout"}
            self.book.end(event.key.removeprefix("locate "), "locate", self.now_s, late)

    def _places(self, to: NodeId, message: Decode) -> None:
        request_id = message.request_id
        for name in ("locate", "queued"):
            self.book.end(request_id, name, self.now_s)
        said: Attributes = {"attempt": message.attempt, "decode": to, "decision": message.decision}
        if message.prefill is not None:
            said["prefill"] = message.prefill
        self.book.begin(request_id, "run", self.now_s, "schedule", said)
        self.book.begin(request_id, "first token", self.now_s, "run")

    def _first_token(self, source: NodeId, message: FirstToken) -> None:
        if self._is_current(message.request_id, message.attempt):
            said: Attributes = {
                "cached_tokens": message.cached_tokens,
                "fetched_blocks": message.fetched_blocks,
            }
            self.book.end(message.request_id, "first token", self.now_s, said)

    def _finished(self, source: NodeId, message: Finished) -> None:
        if self._is_current(message.request_id, message.attempt):
            self._stops(message.request_id, {})

    def _is_current(self, request_id: RequestId, attempt: int) -> bool:
        return self.book.said(request_id, "run", "attempt") == attempt

    def _stops(self, request_id: RequestId, said: Attributes) -> None:
        for name in ("locate", "queued", "first token"):
            self.book.end(request_id, name, self.now_s)
        self.book.end(request_id, "run", self.now_s, said)

    def _resumes(self, to: NodeId, message: Resume) -> None:
        """The attempt before is lost."""
        cause = "worker_lost"
        if isinstance(self.event, Received) and isinstance(self.event.message, AttemptFailed):
            cause = self.event.message.cause.partition(":")[0]
        self._stops(message.request_id, {"error.type": cause})
        self.book.say(message.request_id, "schedule", {"attempts": message.attempt})

    def _fails(self, to: NodeId, message: Failed) -> None:
        """Accepted or not."""
        request_id = message.request_id
        if request_id not in self.book:
            match self.event:
                case Received(source, Submit(request_id=told) as submit) if told == request_id:
                    self._opens(source, submit)
                case _:
                    return
        said: Attributes = {"error.type": message.problem.code.value}
        self._stops(request_id, {})
        self.book.end(request_id, "schedule", self.now_s, said)
        self.book.close(request_id, self.now_s)

    def _stream_ended(self, source: NodeId, message: StreamEnded) -> None:
        if message.request_id not in self._machine.requests:
            self.book.close(message.request_id, self.now_s)

    # --- All of them ------------------------------------------------------------------------------

    def _told(self, source: NodeId, message: Spans) -> None:
        for request in message.requests:
            added = self.store.add(source, message.role, message.epoch, request, self.now_s)
            self._export(added)
        self._set_export_timer()

    def _keep(self, told: list[RequestSpans]) -> None:
        for request in told:
            node = self.node
            self._export(
                self.store.add(node.node_id, Role.SCHEDULER, node.epoch, request, self.now_s)
            )
        self._set_export_timer()

    def _set_export_timer(self) -> None:
        if self.store.any_due and not self._export_set:
            self._export_set = True
            self.more.append(SetTimer(EXPORT_TIMER, self.store.next_due_s()))

    def _leaves(self, effect: Exit) -> None:
        """Nobody will tell more."""
        self._export(self.store.due(math.inf))

    def _export(self, traces: list[Trace]) -> None:
        self.more += [ExportTrace(trace) for trace in traces]

    def _asked(self, source: NodeId, message: FindTrace) -> None:
        self._keep(self.book.take(self.now_s, self._wall_offset_ns(), young=True))
        traces = [
            msgspec.structs.replace(trace, decision=self._decision(trace.request_id))
            for trace in self.store.find(message.name)
        ]
        found = TraceFound(call_id=message.call_id, traces=traces, kept=len(self.store))
        self.more.append(Send(source, found))

    def _decision(self, request_id: RequestId) -> Attributes:
        decision = self._machine.dispatcher.decisions.of(request_id)
        if decision is None:
            return {}
        said: Attributes = msgspec.to_builtins(decision)
        return {name: value for name, value in said.items() if value is not None}
