"""Runs batch plans: the model, its pool of KV blocks, and what is known of each request."""

import logging
import os
import time
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from slipstream.config import SetupError
from slipstream.core.machine import Admission, BatchPlan, Row, RowOutput
from slipstream.engine.batch import Inputs, build_batch, num_samples
from slipstream.engine.decoder import Decoder, DecoderWeights
from slipstream.engine.guide import Guides
from slipstream.engine.history import History
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.packed_file import file_name, shared_weights
from slipstream.engine.sampler import RowError, Sample, sample, score
from slipstream.engine.weights import Progress, load_weights
from slipstream.errors import Problem
from slipstream.kernels import cpu
from slipstream.kernels.build import interpreted
from slipstream.kernels.ops import FLOAT8, Backend, Prepared, Quantization
from slipstream.kernels.program import PANEL, CpuBackend
from slipstream.kernels.reference import Reference
from slipstream.kv.layout import KvDtype, KvLayout
from slipstream.types import BLOCK_TOKENS, RequestId, TokenLogprobs

_LOG = logging.getLogger(__name__)
SAID_EVERY_S = 2.0
_DTYPES: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def allocate_pool(layout: KvLayout, num_blocks: int) -> Tensor:
    """A pool of zeros in private memory, `[num_blocks, *layout.block_shape]`."""
    return torch.zeros((num_blocks, *layout.block_shape), dtype=_DTYPES[layout.dtype])


def choose_backend(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
    threads: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> Backend:
    """Compiled kernels where they are, built now if they are not yet; else plain torch.

    `threads`: of compiled kernels, 0 for one on each core. `kv_dtype`: of the pool, if it is not
    `dtype`. SetupError: this device cannot do that.
    """
    if device.type == "cuda" or interpreted():
        return _triton(config, dtype, device, quantization, kv_dtype)
    library = cpu.kernels()
    if library is None:
        return Reference(quantization)
    if quantization == "fp8" or kv_dtype == FLOAT8:
        _LOG.warning("SLOW: no CPU kernels for float8; give --quantization int8, or no fp8 at all")
        return Reference(quantization)
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size % PANEL for size in sizes):
        _LOG.warning("SLOW: no CPU kernels for sizes that %d does not divide: %s", PANEL, sizes)
        return Reference(quantization)
    return CpuBackend(library, threads or len(os.sched_getaffinity(0)), dtype, quantization)


def _triton(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    kv_dtype: torch.dtype | None,
) -> Backend:
    try:
        # Imported here: who computes on a CPU needs no Triton.
        from slipstream.kernels.gpu.backend import TritonBackend
    except ImportError as error:
        line = f"slipstream: a GPU needs Triton: {error}; install slipstream[gpu]"
        raise SetupError(line) from None
    longest = -(-config.max_position_embeddings // BLOCK_TOKENS)
    try:
        return TritonBackend(dtype, device, quantization, kv_dtype or dtype, max_blocks=longest)
    except ValueError as error:
        raise SetupError(f"slipstream: {error}") from None


def _said_now_and_then() -> Progress:
    """In the log, where `slipstream serve` finds it; of a model that is there at once nothing."""
    said_s = time.monotonic()

    def progress(done: int, layers: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= SAID_EVERY_S:
            said_s = time.monotonic()
            _LOG.info("weights: %d of %d layers", done, layers)

    return progress


class Runner:
    """One model on one device. Not thread-safe: one step at a time.

    The pool is shared with those who transfer blocks; the runner writes only into the slots of a
    step's input tokens.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: KvDtype,
        pool: Tensor,
        threads: int = 0,
        quantization: Quantization = "none",
        packed_dir: Path | None = None,
    ) -> None:
        """`threads`: CPU threads, 0 for one on each core. The model lives where the pool does.
        `packed_dir`: where packed weights are kept. A pool of float8 is one for any `dtype`.

        ModelError: see `ModelConfig.read` and `load_weights`. SetupError: see `choose_backend`.
        ValueError: the pool has another layout.
        """
        self.config = ModelConfig.read(model_path)
        kept: KvDtype = "float8_e4m3fn" if pool.dtype == FLOAT8 else dtype
        self.layout = self.config.kv_layout(kept)
        if pool.shape[1:] != self.layout.block_shape or pool.dtype != _DTYPES[kept]:
            raise ValueError(f"pool is {list(pool.shape)} {pool.dtype}, layout is {self.layout}")
        if threads:
            torch.set_num_threads(threads)
        self._pool = pool
        self._guides = Guides(model_path, self.config)
        wide, device = _DTYPES[dtype], pool.device
        backend = choose_backend(self.config, wide, device, quantization, threads, pool.dtype)

        def load() -> DecoderWeights:
            how = self.config, wide, device, backend
            return load_weights(model_path, *how, _said_now_and_then())

        if packed_dir is None or not isinstance(backend, CpuBackend):
            weights = load()
        else:
            name = file_name(model_path, self.config, wide, quantization)
            weights = shared_weights(packed_dir / name, load)
        if isinstance(backend, CpuBackend):
            # What is left for torch is small. Its threads would wait for each other at every
            # operation, on cores that others share for as long as the kernel lets those run.
            torch.set_num_threads(1)
        self._backend = backend
        self.decoder = Decoder(self.config, weights, backend)
        self._histories: dict[tuple[RequestId, int], History] = {}
        self._failed: dict[tuple[RequestId, int], Problem | None] = {}
        """No tokens come any more, and why."""
        self._guides.wait()

    def prepare(self, rows: int) -> None:
        """What the first steps of up to `rows` requests would wait for: graphs, on a GPU."""
        program: object = self.decoder.program
        if isinstance(program, Prepared):
            with torch.inference_mode():
                program.prepare(self._pool, self.config.head_dim, rows)

    def run(self, plan: BatchPlan) -> tuple[RowOutput, ...]:
        """One step: forget `dropped`, learn `admitted`, run all rows, sample.

        One output for each row that samples or scores, in order of the rows. A row whose logits are
        no numbers, or that lets no token be drawn, yields none but a problem (it is logged, with
        the request's name), as does that request later; the rest of the batch is not harmed.
        KeyError: a row of a request that was never admitted. ValueError: a row that contradicts the
        request's history or exceeds its block table; nothing was computed then.
        """
        for key in plan.dropped:
            self._failed.pop(key, None)
            if (history := self._histories.pop(key, None)) is not None:
                history.drop()
        for admission in plan.admitted:
            key = (admission.request_id, admission.attempt)
            self._histories[key] = self._history(admission)
            self._failed.pop(key, None)
        if not plan.rows:
            return ()
        try:
            with torch.inference_mode():
                inputs = [self._inputs(row) for row in plan.rows]
                batch = build_batch(plan.rows, inputs, self._pool.device)
                logits = self.decoder.forward(batch, self._pool)
                sampling = [
                    (row, each)
                    for row, each in zip(plan.rows, inputs, strict=True)
                    if num_samples(row, each)
                ]
                return self._sample(logits, sampling)
        except BaseException:
            # The step after this one may be on its way, with rows that count on this one's tokens.
            for row in plan.rows:
                self._failed.setdefault((row.request_id, row.attempt))
            raise

    def _history(self, admission: Admission) -> History:
        grammar = admission.sampling.grammar
        guide = self._guides.guide(grammar, admission.num_prompt) if grammar else None
        return History(admission, guide)

    def _inputs(self, row: Row) -> Inputs:
        key = (row.request_id, row.attempt)
        history = self._histories[key]
        if row.num_tokens == 0:
            raise ValueError(f"{row.request_id}: a row without input tokens")
        if row.after_previous and row.tokens:
            raise ValueError(f"{row.request_id}: {len(row.tokens)} tokens behind a sample")
        if row.sample and key not in self._failed:
            if row.position > history.num_output:
                raise ValueError(
                    f"{row.request_id}: position {row.position} after {history.num_output} outputs"
                )
            if not row.after_previous:
                history.truncate(row.position)
        drafts: tuple[int, ...] = ()
        if row.drafts and key not in self._failed:
            drafts = history.drafts.propose(history.tokens, row.drafts)
        if row.after_previous:
            return Inputs((history.tokens[-1],), len(history.tokens) - 1, drafts)
        return Inputs(row.tokens, row.start, drafts)

    def _sample(self, logits: Tensor, sampling: list[tuple[Row, Inputs]]) -> tuple[RowOutput, ...]:
        """A token for each row, then one more for each row whose draft was that token, and so on:
        each is drawn as if it were the only one of its step. What a row drew before it failed
        counts: its request may end with that."""
        ends = list(accumulate(num_samples(row, each) for row, each in sampling))
        firsts = [
            end - row.sample - len(x.drafts) for end, (row, x) in zip(ends, sampling, strict=True)
        ]
        keys = [(row.request_id, row.attempt) for row, _ in sampling]
        # Before the draws: they write into the logits.
        scores = [
            self._scores(logits, first, row)
            for first, (row, _) in zip(firsts, sampling, strict=True)
        ]
        drawn: list[list[Sample]] = [[] for _ in sampling]
        going = [index for index, (row, _) in enumerate(sampling) if row.sample]
        while going:
            rows = [firsts[index] + len(drawn[index]) for index in going]
            histories = [self._histories[keys[index]] for index in going]
            results = sample(self._backend, logits, rows, histories, self.config.eos_token_ids)
            ahead = []
            for index, history, result in zip(going, histories, results, strict=True):
                if isinstance(result, RowError):
                    self._failed.setdefault(keys[index], result.problem)
                    _LOG.warning("no token: %s", result)
                elif keys[index] not in self._failed:
                    drafts, count = sampling[index][1].drafts, len(drawn[index])
                    history.append(result.token)
                    drawn[index].append(result)
                    if count < len(drafts) and drafts[count] == result.token:
                        ahead.append(index)
            going = ahead
        return tuple(
            self._output(key, each, samples, scored)
            for key, (_, each), samples, scored in zip(keys, sampling, drawn, scores, strict=True)
        )

    def _scores(self, logits: Tensor, end: int, row: Row) -> tuple[TokenLogprobs, ...]:
        """Of the tokens of the prompt that follow the row's first inputs, by the logits before
        `end`."""
        count = row.prompt_logprobs
        if not count:
            return ()
        history = self._histories[row.request_id, row.attempt]
        tokens = history.tokens[row.start + 1 : row.start + 1 + count]
        return tuple(
            score(logits[end - count : end], tokens, history.sampling.prompt_logprobs or 0)
        )

    def _output(
        self,
        key: tuple[RequestId, int],
        inputs: Inputs,
        samples: list[Sample],
        scored: tuple[TokenLogprobs, ...],
    ) -> RowOutput:
        drafted = len(inputs.drafts)
        if samples:
            self._histories[key].drafts.learn(drafted, len(samples) - 1)
        logprobs = tuple(each.logprobs for each in samples if each.logprobs is not None)
        tokens = tuple(each.token for each in samples)
        problem = None if samples else self._failed.get(key)
        return RowOutput(*key, tokens, logprobs or None, scored, drafted, problem)
