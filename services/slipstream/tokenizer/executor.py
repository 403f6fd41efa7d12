"""Encodes prompts in threads: the library leaves the interpreter lock alone while it works."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from slipstream.core.machine import Effect, Encoded, EncodePrompt, Event
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import ChatPrompt
from slipstream.tokenizer.admission import LATE
from slipstream.tokenizer.codec import PromptError, TokenizerCodec
from slipstream.tokenizer.constraints import planned, unusable
from slipstream.tokenizer.grammar_check import GrammarCheck, Verdict

_log = logging.getLogger(__name__)


class EncodeExecutor:
    """`max_model_len` says how long a prompt may be at most at this moment; 0: nobody knows."""

    def __init__(
        self,
        codec: TokenizerCodec,
        grammars: GrammarCheck,
        threads: int,
        max_model_len: Callable[[], int],
    ) -> None:
        self._codec = codec
        self._grammars = grammars
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        _log.info("%s", self._codec.dialect)
        await self._grammars.start()

    def execute(self, effect: Effect) -> None:
        assert isinstance(effect, EncodePrompt)
        self._threads.submit(self._encode, effect, self._max_model_len() or None)

    def statistics(self) -> dict[str, float]:
        return self._grammars.statistics()

    async def close(self) -> None:
        """What is being encoded is for nobody any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._grammars.close()

    def _encode(self, effect: EncodePrompt, max_tokens: int | None) -> None:
        param = ""
        try:
            if time.monotonic() >= effect.deadline_s:
                encoded = Encoded(effect.request_id, problem=LATE)
            else:
                encoded, param = self._encoded(effect, max_tokens)
        except PromptError as error:
            encoded = Encoded(effect.request_id, problem=error.problem)
        except RecursionError:
            message = "The messages are nested too deeply to be made a prompt of."
            problem = Problem(code=ErrorCode.INVALID_VALUE, message=message, param="messages")
            encoded = Encoded(effect.request_id, problem=problem)
        except Exception:  # noqa: BLE001 (a prompt that breaks the library ends one request only)
            _log.exception("request %s: the prompt cannot be encoded", effect.request_id)
            message = "The prompt cannot be encoded. The server's log says why."
            problem = Problem(code=ErrorCode.INTERNAL, message=message)
            encoded = Encoded(effect.request_id, problem=problem)
        if not encoded.grammar:
            self._post(encoded)
            return

        def told(verdict: Verdict) -> None:
            problem = _problem(verdict, param)
            self._post(msgspec.structs.replace(encoded, problem=problem) if problem else encoded)

        self._grammars.ask(encoded.grammar, told)

    def _encoded(self, effect: EncodePrompt, max_tokens: int | None) -> tuple[Encoded, str]:
        """And the client's field that asks for its grammar. PromptError."""
        tokens = tuple(self._codec.encode(effect.prompt, max_tokens=max_tokens))
        chat = effect.prompt if isinstance(effect.prompt, ChatPrompt) and effect.parse else None
        answer = planned(
            chat,
            effect.constraint,
            self._codec.dialect,
            self._codec.added_texts,
            self._codec.end_of(tokens),
        )
        encoded = Encoded(
            effect.request_id,
            tokens,
            grammar=answer.grammar,
            bad_tokens=self._codec.avoided(effect.bad_words),
            answer_format=answer.format,
        )
        return encoded, answer.param


def _problem(verdict: Verdict, param: str) -> Problem | None:
    if not verdict.refused:
        return None
    if verdict.late:
        message = f"{param}: it could not be compiled, for {verdict.refused}. Try again."
        return Problem(code=ErrorCode.QUEUE_FULL, message=message, param=param, retry_after_s=1.0)
    message = unusable(verdict.refused, param)
    return Problem(code=ErrorCode.INVALID_SCHEMA, message=message, param=param)
