"""`/tokenize` and `/detokenize` as they live in the tokenizer: a prompt waits for its thread."""

from slipstream.core.machine import Effect, EncodePrompt, Send
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Codec, CodecResult
from slipstream.tokenizer.detokenizer import TextAssembler, TokenBytes
from slipstream.types import NodeId, pack_tokens, unpack_tokens

_PREFIX = "codec:"
"""No request id has a colon."""


class CodecCalls:
    def __init__(self, codec: TokenBytes, calls_max: int, tokens_max: int) -> None:
        self._codec = codec
        self._calls_max, self._tokens_max = calls_max, tokens_max
        self._waiting: dict[str, tuple[NodeId, str]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def owns(self, key: str) -> bool:
        return key.startswith(_PREFIX)

    def ask(self, frontend: NodeId, message: Codec) -> list[Effect]:
        if message.prompt is None:
            return [Send(frontend, self._decoded(message))]
        if len(self._waiting) >= self._calls_max:
            text = f"All {self._calls_max} encodings at a time are in use."
            full = Problem(code=ErrorCode.QUEUE_FULL, message=text, retry_after_s=1.0)
            return [Send(frontend, CodecResult(call_id=message.call_id, problem=full))]
        key = f"{_PREFIX}{frontend}:{message.call_id}"
        if key in self._waiting:
            return []
        self._waiting[key] = frontend, message.call_id
        return [EncodePrompt(key, message.prompt)]

    def encoded(self, key: str, tokens: tuple[int, ...], problem: Problem | None) -> list[Effect]:
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return []
        frontend, call_id = waiting
        texts = [self._codec.token_bytes(token).decode("utf-8", "replace") for token in tokens]
        result = CodecResult(
            call_id=call_id, tokens=pack_tokens(tokens), token_texts=texts, problem=problem
        )
        return [Send(frontend, result)]

    def forget(self, frontend: NodeId) -> None:
        """The session is over, and with it everybody who waited there."""
        gone = [key for key, (waits, _) in self._waiting.items() if waits == frontend]
        for key in gone:
            del self._waiting[key]

    def check(self) -> None:
        assert len(self._waiting) <= self._calls_max

    def _decoded(self, message: Codec) -> CodecResult:
        try:
            tokens = unpack_tokens(message.tokens)
        except ValueError:
            return self._refused(message, ErrorCode.INVALID_VALUE, "The tokens are torn.")
        if len(tokens) > self._tokens_max:
            text = f"There are {len(tokens)} tokens; send at most {self._tokens_max} at a time."
            return self._refused(message, ErrorCode.TOO_LARGE, text)
        assembler = TextAssembler(self._codec, skip_special_tokens=False)
        text = "".join(map(assembler.push, tokens)) + assembler.flush()
        return CodecResult(call_id=message.call_id, text=text)

    def _refused(self, message: Codec, code: ErrorCode, text: str) -> CodecResult:
        problem = Problem(code=code, message=text, param="tokens")
        return CodecResult(call_id=message.call_id, problem=problem)
