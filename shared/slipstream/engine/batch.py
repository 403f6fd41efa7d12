"""A batch plan as tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slipstream.core.machine import Row
from slipstream.kernels.ops import ForwardBatch
from slipstream.types import BLOCK_TOKENS


class Inputs(NamedTuple):
    """A row as the device knows it: which tokens go in, from which position on."""

    tokens: tuple[int, ...]
    start: int
    drafts: tuple[int, ...] = ()
    """What is proposed behind them."""


def num_samples(row: Row, inputs: Inputs) -> int:
    """Of its tokens, the last ones."""
    return row.prompt_logprobs + row.sample + len(inputs.drafts)


def build_batch(
    rows: Sequence[Row], inputs: Sequence[Inputs], device: torch.device
) -> ForwardBatch:
    """Rows that sample do so after their last token and after each draft; logits are made of all
    inputs that a token of the prompt follows whose log probability is wanted.

    Raises ValueError if a block table does not reach to the row's last token.
    """
    tokens = [own + drafts for own, _, drafts in inputs]
    counts = np.fromiter(map(len, tokens), np.int64, len(rows))
    starts = np.fromiter((each.start for each in inputs), np.int64, len(rows))
    query_starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=query_starts[1:])
    lengths = starts + counts
    blocks_needed = -(-lengths // BLOCK_TOKENS)
    tables = np.zeros((len(rows), int(blocks_needed.max())), np.int64)
    for index, row in enumerate(rows):
        needed = int(blocks_needed[index])
        if len(row.block_ids) < needed:
            raise ValueError(
                f"{row.request_id}: {len(row.block_ids)} blocks do not hold {lengths[index]} tokens"
            )
        tables[index, :needed] = row.block_ids[:needed]
    row_of_token = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(query_starts[-1]) + (starts - query_starts[:-1])[row_of_token]
    block_ids = tables[row_of_token, positions // BLOCK_TOKENS]
    samples = np.fromiter(
        map(num_samples, rows, inputs),
        np.int64,
        len(rows),
    )
    # Each row's samples are its last tokens.
    behind = np.concatenate([np.arange(count, 0, -1) for count in samples])

    def tensor(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device)

    return ForwardBatch(
        tokens=tensor(np.concatenate([np.asarray(x, np.int64) for x in tokens]), np.int64),
        positions=tensor(positions, np.int64),
        slots=tensor(block_ids * BLOCK_TOKENS + positions % BLOCK_TOKENS, np.int64),
        block_tables=tensor(tables, np.int32),
        query_starts=tensor(query_starts, np.int32),
        context_lengths=tensor(lengths, np.int32),
        sample_indices=tensor(np.repeat(query_starts[1:], samples) - behind, np.int64),
    )
