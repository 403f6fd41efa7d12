"""What a tokenizer tells of a request: its prompt in tokens, and its tokens in text."""

from collections.abc import Callable

from slipstream.core.machine import Encoded, EncodePrompt, Received, Send
from slipstream.core.span_recorder import SpanRecorder
from slipstream.messages import (
    Failed,
    NodeInfo,
    Resume,
    StreamEnded,
    Submit,
    TextOut,
    Tokenize,
    TokensOut,
)
from slipstream.spans import Attributes
from slipstream.types import NodeId, RequestId, count_tokens


class TokenizerSpans(SpanRecorder):
    def __init__(self, node: NodeInfo, wall_offset_ns: Callable[[], int]) -> None:
        super().__init__(node, wall_offset_ns)
        self._silent: set[RequestId] = set()
        """Those of which no token has come: messages are looked through only while there are
        any."""
        self.heard = {TokensOut: self._tokens, Resume: self._resumed}
        self.happened = {Encoded: self._encoded}
        self.sent = {Submit: self._submits, StreamEnded: self._ended, Failed: self._failed}
        self.done = {EncodePrompt: self._encodes}

    def _encodes(self, effect: EncodePrompt) -> None:
        event = self.event
        if isinstance(event, Received) and isinstance(event.message, Tokenize):  # else: a call
            self.book.open(effect.request_id, self.now_s)
            self.book.begin(effect.request_id, "encode", self.now_s)

    def _encoded(self, event: Encoded) -> None:
        said: Attributes = {"tokens": len(event.tokens)}
        if event.problem is not None:
            said = {"error.type": event.problem.code.value}
        self.book.end(event.request_id, "encode", self.now_s, said)

    def _submits(self, to: NodeId, message: Submit) -> None:
        request_id = message.request_id
        self.book.open(request_id, self.now_s)  # it has come from another tokenizer, encoded
        if not self.book.is_open(request_id, "detokenize"):
            self._silent.add(request_id)

    def _resumed(self, source: NodeId, message: Resume) -> None:
        said: Attributes = {"attempt": message.attempt}
        self.book.add(message.request_id, "submit again", self.now_s, self.now_s, said=said)

    def _tokens(self, source: NodeId, message: TokensOut) -> None:
        if not self._silent:
            return
        for span in message.spans:
            if span.request_id in self._silent:
                self._silent.remove(span.request_id)
                self.book.begin(span.request_id, "detokenize", self.now_s)

    def _ended(self, to: NodeId, message: StreamEnded) -> None:
        request_id = message.request_id
        said: Attributes = {}
        for effect in self.effects:
            if isinstance(effect, Send) and isinstance(effect.message, TextOut):
                for delta in effect.message.deltas:
                    if delta.request_id == request_id and delta.finish_reason is not None:
                        said["tokens"] = delta.position + count_tokens(delta.tokens)
                        said["finish_reason"] = delta.finish_reason.value
        self.book.end(request_id, "detokenize", self.now_s, said)
        self._silent.discard(request_id)
        self.book.close(request_id, self.now_s)

    def _failed(self, to: NodeId, message: Failed) -> None:
        """If the stream is over with it, `StreamEnded` follows."""
        said: Attributes = {"error.type": message.problem.code.value}
        for name in ("encode", "detokenize"):
            self.book.end(message.request_id, name, self.now_s, said)
