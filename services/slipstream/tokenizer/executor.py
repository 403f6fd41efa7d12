"""Encodes prompts in threads: the library leaves the interpreter lock alone while it works."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slipstream.core.machine import Effect, Encoded, EncodePrompt, Event
from slipstream.errors import ErrorCode, Problem
from slipstream.tokenizer.codec import PromptError, TokenizerCodec

_log = logging.getLogger(__name__)


class EncodeExecutor:
    """`max_model_len` says how long a prompt may be at most at this moment; 0: nobody knows."""

    def __init__(
        self, codec: TokenizerCodec, threads: int, max_model_len: Callable[[], int]
    ) -> None:
        self._codec = codec
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post

    def execute(self, effect: Effect) -> None:
        assert isinstance(effect, EncodePrompt)
        self._threads.submit(self._encode, effect, self._max_model_len() or None)

    async def close(self) -> None:
        """What is being encoded is for nobody any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, effect: EncodePrompt, max_tokens: int | None) -> None:
        try:
            tokens = tuple(self._codec.encode(effect.prompt, max_tokens=max_tokens))
            encoded = Encoded(effect.request_id, tokens)
        except PromptError as error:
            encoded = Encoded(effect.request_id, problem=error.problem)
        except Exception:  # noqa: BLE001 (a prompt that breaks the library ends one request only)
            _log.exception("request %s: the prompt cannot be encoded", effect.request_id)
            message = "The prompt cannot be encoded. The server's log says why."
            problem = Problem(code=ErrorCode.INTERNAL, message=message)
            encoded = Encoded(effect.request_id, problem=problem)
        self._post(encoded)
