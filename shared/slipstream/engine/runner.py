"""Runs batch plans: the model, its pool of KV blocks, and what is known of each request."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from slipstream.core.machine import BatchPlan, Row, RowOutput
from slipstream.engine.adapters import AdapterBook, adapter_gone
from slipstream.engine.backends import choose_backend
from slipstream.engine.batch import (
    Inputs,
    Sizes,
    build_batch,
    num_samples,
    pack_batch,
    packed,
    unpacked,
)
from slipstream.engine.guide import Guides
from slipstream.engine.history import History
from slipstream.engine.launched import Launched
from slipstream.engine.lora import LoraLimits
from slipstream.engine.model_config import ServedModel
from slipstream.engine.models import Loading, load_model, read_model
from slipstream.engine.ranks import Ranks
from slipstream.engine.readback import Readback
from slipstream.engine.sampler import RowError, Sample, judged, sample, score, wanted
from slipstream.engine.shaping import is_plain
from slipstream.engine.step_loop import Made, Outputs, Step
from slipstream.errors import Problem
from slipstream.kernels.draw import Draw
from slipstream.kernels.ops import FLOAT8, ForwardBatch, Prepared, Quantization
from slipstream.kv.layout import KvDtype, KvLayout
from slipstream.types import RequestId, SamplingParams, TokenLogprobs

_LOG = logging.getLogger(__name__)
_ONE_RANK = (
    "no LoRA adapters with --tensor-parallel-size {}; serve the model by one rank, or merge the "
    "adapter into it"
)
Tell: TypeAlias = Callable[[Sizes], None]
"""Says to the ranks above 0 that a batch of these sizes follows."""
_DTYPES: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def allocate_pool(layout: KvLayout, num_blocks: int, device: torch.device | None = None) -> Tensor:
    """A pool of zeros in private memory, `[num_blocks, *layout.block_shape]`."""
    shape = (num_blocks, *layout.block_shape)
    return torch.zeros(shape, dtype=_DTYPES[layout.dtype], device=device)


class Runner:
    """One model on one device. Not thread-safe: one step at a time.

    The pool is shared with those who transfer blocks; the runner writes only into the slots of a
    step's input tokens.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: KvDtype,
        pool: Tensor | torch.device,
        threads: int = 0,
        quantization: Quantization = "none",
        packed_dir: Path | None = None,
        dummy: bool = False,
        ranks: Ranks | None = None,
        tell: Tell = lambda sizes: None,
        config: ServedModel | None = None,
        kv_dtype: KvDtype | None = None,
        lora: LoraLimits = LoraLimits(),  # noqa: B008 it never changes
    ) -> None:
        """`pool`: or the device where one will be, to be said by `attach`; the model lives there.
        `threads`: CPU threads, 0 for one on each core. `packed_dir`: where packed weights are kept.
        `dummy`: random weights. `ranks`: those that compute with this one; `tell`: of rank 0, so
        that they `follow`. `config`: what `read_model` said of the model, if it has been asked.
        `kv_dtype`: of a pool that is not there yet, if it is not `dtype`. `lora`: what adapters may
        take.

        ModelError: see `read_model` and `load_model`. SetupError: see `choose_backend`. ValueError:
        the pool has another layout.
        """
        self.config = config or read_model(model_path, dummy=dummy)
        own = self.config.part(ranks.size) if ranks else self.config
        if isinstance(pool, Tensor) and pool.dtype == FLOAT8:
            kv_dtype = "float8_e4m3fn"
        self.layout, self._dtype = own.kv_layout(kv_dtype or dtype), _DTYPES[dtype]
        self._device = pool.device if isinstance(pool, Tensor) else pool
        if isinstance(pool, Tensor):
            self.attach(pool)
        if threads:
            torch.set_num_threads(threads)
        self._guides = Guides(model_path, self.config)
        kept = _DTYPES[self.layout.dtype]
        given = own, self._dtype, self._device, quantization, threads
        backend = choose_backend(*given, kv_dtype=kept, ranks=bool(ranks))
        self._backend, self._ranks, self._tell = backend, ranks, tell
        how = Loading(self._dtype, self._device, backend, packed_dir, dummy, ranks, kept)
        self.decoder = load_model(model_path, self.config, how)
        alone = "" if ranks is None else _ONE_RANK.format(ranks.size)
        self.adapters = AdapterBook(self.decoder, self._dtype, lora, alone)
        self._histories: dict[tuple[RequestId, int], History] = {}
        self._failed: dict[tuple[RequestId, int], Problem | None] = {}
        """No tokens come any more, and why."""
        self._flying: Launched | None = None
        """The step launched last, while what it drew is on its way."""
        self._guides.wait()

    def attach(self, pool: Tensor) -> None:
        """From now on this is the pool. ValueError: it has another layout, or is elsewhere."""
        fits = (pool.dtype, pool.device) == (_DTYPES[self.layout.dtype], self._device)
        if pool.shape[1:] != self.layout.block_shape or not fits:
            raise ValueError(f"pool is {list(pool.shape)} {pool.dtype}, layout is {self.layout}")
        self._pool = pool

    def prepare(self, rows: int) -> None:
        """What the first steps of up to so many streams would wait for: graphs, on a GPU."""
        program: object = getattr(self.decoder, "program", None)
        if isinstance(program, Prepared):
            with self._on_device(), torch.inference_mode():
                program.prepare(self._pool, self.config.head_dim, rows)

    def rehearse(self, rows: Sequence[Row]) -> None:
        """Computes a step, in blocks that are thrown away; of its logits tokens are drawn. So what
        such a step takes of the device's memory has been taken once."""
        blocks = 1 + max(block for row in rows for block in row.block_ids)
        pool = allocate_pool(self.layout, blocks, self._device)
        inputs = [Inputs(row.tokens, row.start) for row in rows]
        with self._on_device(), torch.inference_mode():
            batch = build_batch(rows, inputs, self._device)
            logits = self.decoder.forward(batch, pool)
            draws = [Draw(index, 1.0, 40, 0.9, 0.0, 0.5) for index in range(len(logits))]
            Readback(*self._backend.draw_async(logits, draws)).values()

    def follow(self, sizes: Sizes) -> None:
        """Above rank 0: computes the batch that rank 0 computes now."""
        assert self._ranks is not None
        with self._on_device(), torch.inference_mode():
            memory = torch.empty(sizes.num_bytes, dtype=torch.uint8, device=self._device)
            batch = unpacked(self._ranks.broadcast(memory), sizes)
            self.decoder.forward(batch, self._pool)
            self._meet(sizes)

    def _meet(self, sizes: Sizes) -> None:
        """Where nothing is sampled nobody waits, in the last layer's sums, for others' blocks."""
        if self._ranks is not None and not sizes.samples:
            self._ranks.meet()

    def _on_device(self) -> AbstractContextManager[object]:
        """Each thread has a current GPU of its own, the first one until it says otherwise."""
        on_gpu = self._device.type == "cuda"
        return torch.cuda.device(self._device) if on_gpu else nullcontext()

    def run(self, plan: BatchPlan) -> Outputs:
        """One step, waited for: see `launch`."""
        return self.launch(plan).finish()

    def waits(self, plan: BatchPlan) -> bool:
        """Whether the host has to know what the step before it drew: some row draws by more than
        its logits, or proposes, or scores a prompt."""
        new = {(each.request_id, each.attempt): each.sampling for each in plan.admitted}
        return not all(self._is_plain(row, new) for row in plan.rows)

    def launch(self, plan: BatchPlan) -> Step:
        """One step: forget `dropped`, learn `admitted`, run all rows, sample.

        Where all rows are plain nothing is waited for: what they draw stays on the device, where
        the next step finds it. So the next one may be launched before this one is finished, unless
        that `waits`.

        One output for each row that samples or scores, in order of the rows. A row whose logits are
        no numbers, or that lets no token be drawn, yields none but a problem (it is logged, with
        the request's name), as does that request later; the rest of the batch is not harmed. So
        does any row whose adapter is not there, those that make nothing too, behind the others.
        KeyError: a row of a request that was never admitted. ValueError: a row that contradicts the
        request's history or exceeds its block table; nothing was computed then.
        """
        for key in plan.dropped:
            self._failed.pop(key, None)
            if (history := self._histories.pop(key, None)) is not None:
                history.drop()
        for admission in plan.admitted:
            key = (admission.request_id, admission.attempt)
            grammar = admission.sampling.grammar
            guide = self._guides.guide(grammar, admission.num_prompt) if grammar else None
            self._histories[key] = History(admission, guide)
            self._failed.pop(key, None)
        if not plan.rows:
            return Made(())
        with self._failing(plan), torch.inference_mode():
            inputs = [self._inputs(row) for row in plan.rows]
            memory, sizes = pack_batch(plan.rows, inputs, self._device)
            batch = self._with_adapters(unpacked(memory, sizes), plan.rows, inputs)
            self._fill(batch.tokens, plan.rows, inputs)
            if self._ranks is not None:
                self._tell(sizes)
                self._ranks.broadcast(memory)
            logits = self.decoder.forward(batch, self._pool)
            self._meet(sizes)
            pairs = zip(plan.rows, inputs, strict=True)
            sampling = [(row, each) for row, each in pairs if num_samples(row, each)]
            if self.waits(plan):
                return Made(self._sample(logits, sampling) + self._unserved(plan))
            rows = [row for row, _ in sampling]
            self._flying = Launched(self._finished, plan, rows, *self._draw(logits, rows))
            return self._flying

    @contextmanager
    def _failing(self, plan: BatchPlan) -> Iterator[None]:
        """The step after this one may be on its way, with rows that count on this one's tokens."""
        try:
            with self._on_device():
                yield
        except BaseException:
            for row in plan.rows:
                self._failed.setdefault((row.request_id, row.attempt))
            raise

    def _is_plain(self, row: Row, new: Mapping[tuple[RequestId, int], SamplingParams]) -> bool:
        if row.drafts or row.prompt_logprobs or not row.sample:
            return not row.drafts and not row.prompt_logprobs
        key = (row.request_id, row.attempt)
        if key in new:
            return is_plain(new[key])
        return key in self._histories and self._histories[key].plain

    def _drawn_unseen(self, key: tuple[RequestId, int]) -> int:
        """Tokens, none or one, that the step in flight draws for it."""
        return self._flying is not None and key in self._flying.places

    def _fill(self, tokens: Tensor, rows: Sequence[Row], inputs: Sequence[Inputs]) -> None:
        """Input tokens that the step in flight draws, put where they belong on the device."""
        if self._flying is None:
            return
        into, places, end = [], [], 0
        for row, each in zip(rows, inputs, strict=True):
            place = self._flying.places.get((row.request_id, row.attempt))
            if row.after_previous and place is not None:
                into.append(end)
                places.append(place)
            end += len(each.tokens) + len(each.drafts)
        if into:
            where = packed(np.asarray([into, places]), pinned=tokens.is_cuda)
            to, source = where.view(torch.int64).view(2, -1).to(tokens.device, non_blocking=True)
            tokens.index_copy_(0, to, self._flying.tokens.index_select(0, source))

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        draws = []
        for index, row in enumerate(rows):
            key = (row.request_id, row.attempt)
            history = self._histories[key]
            position = history.num_output + self._drawn_unseen(key)
            draws.append(wanted(index, history.sampling, position))
        return self._backend.draw_async(logits, draws)

    def _finished(self, step: Launched) -> Outputs:
        """What it drew; as `_sample`, of plain rows."""
        if self._flying is step:
            self._flying = None
        with self._failing(step.plan):
            tokens, tops = step.readback.values()
        outputs = []
        for row, token, top in zip(step.rows, tokens, tops, strict=True):
            key = (row.request_id, row.attempt)
            history = self._histories[key]
            result = judged(history, int(token), top)
            if isinstance(result, RowError):
                self._failed.setdefault(key, result.problem)
                _LOG.warning("no token: %s", result)
            elif key not in self._failed:
                history.append(result.token)
                outputs.append(RowOutput(*key, (result.token,)))
                continue
            outputs.append(RowOutput(*key, (), problem=self._failed[key]))
        return tuple(outputs) + self._unserved(step.plan)

    def _with_adapters(
        self, batch: ForwardBatch, rows: Sequence[Row], inputs: Sequence[Inputs]
    ) -> ForwardBatch:
        """A request whose adapter is not there fails: without it, it is another."""
        keys = [(row.request_id, row.attempt) for row in rows]
        ids = [self._histories[key].adapter for key in keys]
        for key, adapter in zip(keys, ids, strict=True):
            if adapter and not self.adapters.has(adapter):
                self._failed.setdefault(key, adapter_gone(adapter))
        counts = [len(each.tokens) + len(each.drafts) for each in inputs]
        return self.adapters.wanted(batch, ids, counts)

    def _unserved(self, plan: BatchPlan) -> Outputs:
        """Of rows that make nothing, those whose keys and values must not be used."""
        silent = [row for row in plan.rows if not (row.sample or row.prompt_logprobs)]
        keys = [(row.request_id, row.attempt) for row in silent]
        return tuple(
            RowOutput(*key, (), problem=problem)
            for key in keys
            if (problem := self._failed.get(key))
        )

    def _inputs(self, row: Row) -> Inputs:
        key = (row.request_id, row.attempt)
        history = self._histories[key]
        if row.num_tokens == 0:
            raise ValueError(f"{row.request_id}: a row without input tokens")
        if row.after_previous and row.tokens:
            raise ValueError(f"{row.request_id}: {len(row.tokens)} tokens behind a sample")
        if row.sample and key not in self._failed:
            outputs = history.num_output + self._drawn_unseen(key)
            if row.position > outputs:
                raise ValueError(
                    f"{row.request_id}: position {row.position} after {outputs} outputs"
                )
            if not row.after_previous:
                history.truncate(row.position)
        drafts: tuple[int, ...] = ()
        if row.drafts and key not in self._failed:
            drafts = history.drafts.propose(history.tokens, row.drafts)
        if row.after_previous and self._drawn_unseen(key):
            return Inputs((0,), len(history.tokens))  # `_fill` has the token
        if row.after_previous:
            return Inputs((history.tokens[-1],), len(history.tokens) - 1, drafts)
        return Inputs(row.tokens, row.start, drafts)

    def _sample(self, logits: Tensor, sampling: list[tuple[Row, Inputs]]) -> Outputs:
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
