"""Holds an answer to its grammar: which tokens may come next.

Where an answer stands in its grammar follows from its tokens alone. So a worker that takes it over
feeds them to a fresh matcher and stands where the first one stood.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from slipstream.engine.model_config import ServedModel
from slipstream.grammar import STACK_BYTES, GrammarError, Grammars, stack_of, tokenizer

COMPILE_TIMEOUT_S = 2.0
"""A step waits no longer for the grammars of all its rows together. One takes a second of a core at
most; so who is not ready by then stands behind others."""

Biases: TypeAlias = npt.NDArray[np.float32]
"""0 for a token that may come next, -inf for one that may not."""

_BITS = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8) & 1
_BIASES: Biases = np.where(_BITS, 0.0, -np.inf).astype(np.float32)
"""Of the eight tokens of a byte of a mask, the lowest bit first."""

_LOG = logging.getLogger(__name__)


class LateError(GrammarError):
    """It is not compiled yet. Nobody is to blame, and it may be tried again."""


class UnreadError(GrammarError):
    """No answer of this worker can be held to any grammar, for it has no tokens to do so."""


class Guide:
    """Of one answer. Its grammar is compiled while the model computes the prompt."""

    def __init__(self, matcher: "Future[LLMatcher]", masks: "Masks", num_prompt: int) -> None:
        self._matcher, self._masks, self._fed = matcher, masks, num_prompt

    def biases(self, tokens: Sequence[int]) -> Biases:
        """What may follow `tokens`, prompt and answer, which have only grown or been truncated:
        `[vocab]`, valid until anybody asks again.

        At the grammar's end that is the ends of sequence alone, then and ever after. GrammarError:
        it cannot be compiled, the answer does not follow it, or it is too complex from here on.
        Does not wait, `settle` does. LateError: the grammar is not compiled yet.
        """
        if not self._matcher.done():
            raise LateError("too many others are compiled before it")
        matcher = self._matcher.result()
        self._fed += matcher.try_consume_tokens(list(tokens[self._fed :]))
        if self._fed < len(tokens) and not matcher.is_stopped():
            raise GrammarError(f"token {tokens[self._fed]} of the answer does not follow it")
        biases = self._masks.biases(matcher)
        if matcher.is_error():
            raise GrammarError(" ".join(matcher.get_error().split()))
        return biases

    def truncate(self, num_tokens: int) -> None:
        """Of prompt and answer together only so many are left."""
        if num_tokens < self._fed:
            self._matcher.result().rollback(self._fed - num_tokens)
            self._fed = num_tokens

    def drop(self) -> None:
        """Nobody asks any more. What is not being compiled yet never is: others wait for that."""
        self._matcher.cancel()

    @staticmethod
    def settle(guides: "Iterable[Guide]") -> None:
        """Until all their grammars are compiled, or `COMPILE_TIMEOUT_S`."""
        waiting = [guide._matcher for guide in guides if not guide._matcher.done()]
        if waiting:
            wait(waiting, COMPILE_TIMEOUT_S)


class Masks:
    """Room for one mask, used again and again: fresh pages would cost more than what is done in
    them. A bit for each token becomes a number by table; to branch on each takes 15 times as long.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32) * 4, np.uint8)
        self._biases: Biases = np.zeros((len(self._bits), 8), np.float32)

    def biases(self, matcher: LLMatcher) -> Biases:
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        np.take(_BIASES, self._bits, 0, out=self._biases, mode="clip")  # `raise` copies first
        return self._biases.reshape(-1)[: self._vocab_size]


class Guides:
    """Of one model. Its tokens are read on a thread, before grammars are compiled there."""

    def __init__(self, model_path: str | Path, config: ServedModel) -> None:
        self._masks = Masks(config.vocab_size)
        self._thread = ThreadPoolExecutor(1, "grammar")
        with stack_of(STACK_BYTES):
            self._grammars = self._thread.submit(_read, model_path, config)

    def wait(self) -> None:
        """Until the tokens are read; their reader keeps other threads waiting anyway."""
        if (error := self._grammars.exception()) is not None:
            _LOG.warning("answers cannot be held to a grammar: %s", error)

    def guide(self, grammar: str, num_prompt: int) -> Guide:
        """For one answer, from its beginning."""
        return Guide(self._thread.submit(self._matcher, grammar), self._masks, num_prompt)

    def _matcher(self, grammar: str) -> LLMatcher:
        if (error := self._grammars.exception()) is not None:
            raise UnreadError(str(error)) from error
        return self._grammars.result().matcher(grammar)


def _read(model_path: str | Path, config: ServedModel) -> Grammars:
    return Grammars(tokenizer(model_path, config.vocab_size, config.eos_token_ids))
