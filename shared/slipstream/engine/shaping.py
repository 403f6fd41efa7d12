"""Which tokens a request lets be drawn, and which it favours: logits, changed before the draw.

In vLLM's order: grammar, allowed ids, bad words, min_tokens, bias. What is barred gets -inf, which
no bias lifts.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slipstream.engine.guide import Guide
from slipstream.types import SamplingParams

Ids: TypeAlias = npt.NDArray[np.int64]


class Shaping:
    """Of one request, made once. A function of its tokens, in whatever steps they came."""

    def __init__(self, sampling: SamplingParams, num_prompt: int, guide: Guide | None) -> None:
        """`guide`: where `sampling` has a grammar."""
        self._sampling, self._num_prompt, self._guide = sampling, num_prompt, guide
        bias = dict(sampling.logit_bias)
        self._biased = _sorted_ids(bias)
        self._bias = np.asarray([bias[token] for token in self._biased.tolist()], np.float32)
        self._allowed = _sorted_ids(sampling.allowed_token_ids)
        self._bad: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        """Sequences of several tokens, by the last but one."""
        for sequence in sampling.bad_tokens:
            if len(sequence) > 1:
                self._bad[sequence[-2]].append(sequence)
        self._always_bad = _sorted_ids(each[0] for each in sampling.bad_tokens if len(each) == 1)

    @classmethod
    def of(cls, sampling: SamplingParams, num_prompt: int, guide: Guide | None) -> "Shaping | None":
        """None where there is nothing to do, ever."""
        return cls(sampling, num_prompt, guide) if cls.wanted(sampling) else None

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return bool(
            sampling.grammar
            or sampling.min_tokens
            or sampling.logit_bias
            or sampling.allowed_token_ids
            or sampling.bad_tokens
        )

    def apply(self, logits: Tensor, tokens: Sequence[int], eos_token_ids: frozenset[int]) -> None:
        """Changes one row, `[vocab]`, in place; `tokens` are prompt and output.

        If all are barred, all become -inf. GrammarError: see `Guide.biases`.
        """
        biases = None
        if self._guide is not None:
            biases = self._guide.biases(tokens)
            logits += torch.from_numpy(biases).to(logits.device)
        if self._sampling.allowed_token_ids:
            _keep(logits, _within(self._allowed, logits))
        _bar(logits, self._always_bad)
        if self._bad:
            _bar(logits, self._completing(tokens))
        ends = self._too_early(len(tokens) - self._num_prompt, eos_token_ids)
        if biases is None:
            _bar(logits, ends)
        elif (biases[ends[ends < len(biases)]] == 0.0).any():
            _bar_unless_alone(logits, ends)
        if self._biased.size:
            ids = _within(self._biased, logits)
            logits[ids] += torch.from_numpy(self._bias[: len(ids)]).to(logits.device)

    def _completing(self, tokens: Sequence[int]) -> Ids:
        """Last tokens of the bad sequences that the output has all others of."""
        last, most = tokens[-1], len(tokens) - self._num_prompt
        return _sorted_ids(
            bad[-1]
            for bad in (self._bad.get(last, ()) if most else ())
            if len(bad) <= most + 1 and tuple(tokens[1 - len(bad) :]) == bad[:-1]
        )

    def _too_early(self, num_output: int, eos_token_ids: frozenset[int]) -> Ids:
        """What would end the answer before its time. Under a grammar an end of sequence is such
        with `ignore_eos` too: it would end the answer."""
        sampling, held = self._sampling, self._guide is not None
        early, endless = num_output < sampling.min_tokens, sampling.ignore_eos
        ends = set(sampling.stop_token_ids) if early else set()
        if (early or endless) if held else (early and not endless):
            ends |= eos_token_ids
        return _sorted_ids(ends)


def is_plain(params: SamplingParams) -> bool:
    """Whether its draws need the logits alone: neither the tokens before, nor the host."""
    return (
        params.logprobs is None
        and params.repetition_penalty == 1.0
        and params.frequency_penalty == params.presence_penalty == 0.0
        and not Shaping.wanted(params)
    )


def _sorted_ids(ids: Iterable[int]) -> Ids:
    return np.asarray(sorted({token for token in ids if token >= 0}), np.int64)


def _within(ids: Ids, logits: Tensor) -> Tensor:
    """Those that there are logits of."""
    return torch.from_numpy(ids[: np.searchsorted(ids, logits.shape[0])]).to(logits.device)


def _keep(logits: Tensor, ids: Tensor) -> None:
    kept = logits[ids]
    logits.fill_(-math.inf)
    logits[ids] = kept


def _bar(logits: Tensor, ids: Ids) -> None:
    if ids.size:
        logits[_within(ids, logits)] = -math.inf


def _bar_unless_alone(logits: Tensor, ids: Ids) -> None:
    """A grammar's end is never too early: where nothing else may follow, it stays."""
    known = _within(ids, logits)
    kept = logits[known]
    logits[known] = -math.inf
    if logits.max() == -math.inf:
        logits[known] = kept
