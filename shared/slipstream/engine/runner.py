"""Runs batch plans: the model, its pool of KV blocks, and what is known of each request."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from slipstream.core.machine import BatchPlan, Row, RowOutput
from slipstream.engine.batch import build_batch
from slipstream.engine.decoder import Decoder, DecoderWeights
from slipstream.engine.history import History
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.packed_file import file_name, shared_weights
from slipstream.engine.sampler import RowError, sample
from slipstream.engine.weights import load_weights
from slipstream.kernels import cpu
from slipstream.kernels.ops import Backend
from slipstream.kernels.program import PANEL, CpuBackend
from slipstream.kernels.reference import Reference
from slipstream.kv.layout import KvDtype, KvLayout
from slipstream.types import RequestId

_LOG = logging.getLogger(__name__)
_DTYPES: dict[KvDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def allocate_pool(layout: KvLayout, num_blocks: int) -> Tensor:
    """A pool of zeros in private memory, `[num_blocks, *layout.block_shape]`."""
    return torch.zeros((num_blocks, *layout.block_shape), dtype=_DTYPES[layout.dtype])


def choose_backend(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, int8: bool = False
) -> Backend:
    """Compiled kernels where they are, built now if they are not yet; else plain torch."""
    library = cpu.kernels() if device.type == "cpu" else None
    if library is None:
        return Reference(int8)
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size % PANEL for size in sizes):
        _LOG.warning("SLOW: no CPU kernels for sizes that %d does not divide: %s", PANEL, sizes)
        return Reference(int8)
    return CpuBackend(library, torch.get_num_threads(), dtype, int8)


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
        int8: bool = False,
        packed_dir: Path | None = None,
    ) -> None:
        """`threads`: CPU threads, 0 leaves torch's choice. The model lives where the pool does.
        `int8`: of the weights of matrix products. `packed_dir`: where packed weights are kept.

        ModelError: see `ModelConfig.read` and `load_weights`. ValueError: the pool has another
        layout.
        """
        self.config = ModelConfig.read(model_path)
        self.layout = self.config.kv_layout(dtype)
        if pool.shape[1:] != self.layout.block_shape or pool.dtype != _DTYPES[dtype]:
            raise ValueError(f"pool is {list(pool.shape)} {pool.dtype}, layout is {self.layout}")
        if threads:
            torch.set_num_threads(threads)
        self._pool = pool
        backend = choose_backend(self.config, pool.dtype, pool.device, int8)

        def load() -> DecoderWeights:
            return load_weights(model_path, self.config, pool.dtype, pool.device, backend)

        if packed_dir is None or not isinstance(backend, CpuBackend):
            weights = load()
        else:
            name = file_name(model_path, self.config, pool.dtype, int8)
            weights = shared_weights(packed_dir / name, load)
        self._decoder = Decoder(self.config, weights, backend)
        self._histories: dict[tuple[RequestId, int], History] = {}
        self._failed: set[tuple[RequestId, int]] = set()

    def run(self, plan: BatchPlan) -> tuple[RowOutput, ...]:
        """One step: forget `dropped`, learn `admitted`, run all rows, sample.

        One output for each row with `sample`, in order of the rows. A row whose logits are no
        numbers yields no token (it is logged, with the request's name), nor does that request
        later; the rest of the batch is not harmed.
        KeyError: a row of a request that was never admitted. ValueError: a row that contradicts the
        request's history or exceeds its block table; nothing was computed then.
        """
        for key in plan.dropped:
            self._histories.pop(key, None)
            self._failed.discard(key)
        for admission in plan.admitted:
            key = (admission.request_id, admission.attempt)
            self._histories[key] = History(admission)
            self._failed.discard(key)
        if not plan.rows:
            return ()
        with torch.inference_mode():
            inputs = [self._inputs(row) for row in plan.rows]
            batch = build_batch(plan.rows, inputs, self._pool.device)
            logits = self._decoder.forward(batch, self._pool)
            return self._sample(logits, [row for row in plan.rows if row.sample])

    def _inputs(self, row: Row) -> tuple[int, ...]:
        key = (row.request_id, row.attempt)
        history = self._histories[key]
        if row.num_tokens == 0:
            raise ValueError(f"{row.request_id}: a row without input tokens")
        if row.sample and key not in self._failed:
            if row.position > history.num_output:
                raise ValueError(
                    f"{row.request_id}: position {row.position} after {history.num_output} outputs"
                )
            history.truncate(row.position)
        if not row.after_previous:
            return row.tokens
        return (history.tokens[-1], *row.tokens)

    def _sample(self, logits: Tensor, rows: list[Row]) -> tuple[RowOutput, ...]:
        keys = [(row.request_id, row.attempt) for row in rows]
        histories = [self._histories[key] for key in keys]
        outputs = []
        results = sample(logits, histories, self.config.eos_token_ids) if rows else []
        for key, history, result in zip(keys, histories, results, strict=True):
            request_id, attempt = key
            if isinstance(result, RowError):
                self._failed.add(key)
                _LOG.error("no token: %s", result)
            if isinstance(result, RowError) or key in self._failed:
                outputs.append(RowOutput(request_id, attempt, ()))
                continue
            history.append(result.token)
            logprobs = None if result.logprobs is None else (result.logprobs,)
            outputs.append(RowOutput(request_id, attempt, (result.token,), logprobs))
        return tuple(outputs)
