"""What a frontend tells of a request: from the checked HTTP request to the end of the answer.

Also its door to the traces, which the scheduler keeps. Names of attributes are OpenTelemetry's
(GenAI) where it has one.
"""

from collections.abc import Callable

from slipstream.core.machine import Closed, Deliver, DeliverTrace, Opened, Send, TraceAsked
from slipstream.core.span_recorder import SpanRecorder
from slipstream.errors import Problem
from slipstream.messages import (
    SCHEDULER,
    ChatPrompt,
    FindTrace,
    NodeInfo,
    TextDelta,
    Tokenize,
    TraceFound,
)
from slipstream.spans import ROOT, TENANT, Attributes
from slipstream.types import NodeId, RequestId


class FrontendSpans(SpanRecorder):
    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int]) -> None:
        super().__init__(node, wall_offset_ns)
        self._silent: set[RequestId] = set()
        """Those whose client has no token yet."""
        self.heard = {TraceFound: self._found}
        self.happened = {Opened: self._opened, Closed: self._closed, TraceAsked: self._asked}
        self.sent = {Tokenize: self._gives}
        self.done = {Deliver: self._delivers}

    def _opened(self, event: Opened) -> None:
        submission = event.submission
        request_id, sampling = submission.request_id, submission.sampling
        if request_id in self.book:
            return
        chat = isinstance(submission.prompt, ChatPrompt)
        said: Attributes = {
            "gen_ai.operation.name": "chat" if chat else "text_completion",
            "gen_ai.provider.name": "slipstream",
            "gen_ai.request.model": event.model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.id": request_id.rpartition("-")[0] or request_id,
        }
        if submission.tenant:
            said[TENANT] = submission.tenant
        self.book.open(request_id, self.now_s, event.context)
        self.book.begin(request_id, ROOT, self.now_s, said=said)
        self.book.begin(request_id, "tokenize", self.now_s)

    def _gives(self, to: NodeId, message: Tokenize) -> None:
        """To a tokenizer: the first one, or one more."""
        name = "tokenizer" if message.attempt == 1 else "moved_to"
        self.book.say(message.request_id, ROOT, {name: to})

    def _delivers(self, effect: Deliver) -> None:
        """For each piece of each answer: what is of no interest is left at once."""
        item, request_id = effect.item, effect.request_id
        if isinstance(item, TextDelta):
            if item.tokens and request_id in self._silent:
                self._silent.remove(request_id)
                self.book.end(request_id, "first token", self.now_s)
                self.book.begin(request_id, "stream", self.now_s)
            if item.finish_reason is not None:
                self._finished(request_id, item)
        elif isinstance(item, Problem):
            self.book.say(request_id, ROOT, {"error.type": item.code.value})
            self._over(request_id)
        else:
            self.book.end(request_id, "tokenize", self.now_s, {"gen_ai.usage.input_tokens": item})
            self.book.begin(request_id, "first token", self.now_s)
            self._silent.add(request_id)

    def _finished(self, request_id: RequestId, delta: TextDelta) -> None:
        assert delta.finish_reason is not None
        said: Attributes = {"gen_ai.response.finish_reasons": delta.finish_reason.value}
        if delta.path:
            said["path"] = delta.path
        if delta.usage is not None:
            said["gen_ai.usage.input_tokens"] = delta.usage.prompt_tokens
            said["gen_ai.usage.output_tokens"] = delta.usage.completion_tokens
            said["gen_ai.usage.cache_read.input_tokens"] = delta.usage.cached_tokens
        self.book.say(request_id, ROOT, said)
        self._over(request_id)

    def _over(self, request_id: RequestId) -> None:
        """Its client has the last item; the handler has still to close it."""
        self._silent.discard(request_id)
        for name in ("tokenize", "first token", "stream"):
            self.book.end(request_id, name, self.now_s)
        self.book.end(request_id, ROOT, self.now_s)

    def _closed(self, event: Closed) -> None:
        request_id = event.request_id
        if self.book.is_open(request_id, ROOT):
            self.book.say(request_id, ROOT, {"error.type": "client_left"})
            self._over(request_id)
        self.book.close(request_id, self.now_s)

    def _asked(self, event: TraceAsked) -> None:
        self.more.append(Send(SCHEDULER, FindTrace(call_id=event.call_id, name=event.name)))

    def _found(self, source: NodeId, message: TraceFound) -> None:
        self.more.append(DeliverTrace(message))
