"""`/tokenize` and `/detokenize` as they live in the frontend, which asks a tokenizer and waits."""

from collections.abc import Iterable

from slipstream.core.machine import CodecAsked, DeliverCodec, Effect, Send
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Codec, CodecResult
from slipstream.types import NodeId


class CodecCalls:
    def __init__(self, calls_max: int, timeout_s: float, retry_after_s: float) -> None:
        self._calls_max, self._timeout_s, self._retry_after_s = calls_max, timeout_s, retry_after_s
        self._calls: dict[str, tuple[NodeId, float]] = {}
        """Who was asked, and until when the answer is waited for."""

    def __len__(self) -> int:
        return len(self._calls)

    def ask(self, asked: CodecAsked, tokenizer: NodeId | None, now_s: float) -> Effect:
        call_id = asked.call_id
        if tokenizer is None:
            return self._refused(call_id, ErrorCode.NOT_READY, "No tokenizer answers.")
        if len(self._calls) >= self._calls_max:
            text = f"{self._calls_max} calls are live; send the request again."
            return self._refused(call_id, ErrorCode.QUEUE_FULL, text)
        self._calls[call_id] = tokenizer, now_s + self._timeout_s
        return Send(tokenizer, Codec(call_id=call_id, prompt=asked.prompt, tokens=asked.tokens))

    def answered(self, source: NodeId, result: CodecResult) -> list[Effect]:
        call_id = result.call_id
        if self._calls.get(call_id, ("", 0.0))[0] != source:
            return []
        del self._calls[call_id]
        texts = tuple(result.token_texts)
        return [DeliverCodec(call_id, result.tokens, texts, result.text, result.problem)]

    def lost(self, tokenizer: NodeId) -> list[Effect]:
        message = "The tokenizer was lost; send the request again."
        problem = Problem(code=ErrorCode.NOT_READY, message=message)
        return self._end(
            (c for c, (asked, _) in self._calls.items() if asked == tokenizer), problem
        )

    def tick(self, now_s: float) -> list[Effect]:
        message = f"No answer within {self._timeout_s:g} s."
        problem = Problem(code=ErrorCode.DEADLINE, message=message)
        return self._end((c for c, (_, due_s) in self._calls.items() if now_s >= due_s), problem)

    def _end(self, calls: Iterable[str], problem: Problem) -> list[Effect]:
        ended = list(calls)
        for call_id in ended:
            del self._calls[call_id]
        return [DeliverCodec(call_id, problem=problem) for call_id in ended]

    def _refused(self, call_id: str, code: ErrorCode, message: str) -> Effect:
        problem = Problem(code=code, message=message, retry_after_s=self._retry_after_s)
        return DeliverCodec(call_id, problem=problem)
