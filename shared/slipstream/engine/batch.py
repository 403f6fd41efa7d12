"""A batch plan as tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slipstream.core.machine import Row
from slipstream.kernels.ops import ForwardBatch
from slipstream.types import BLOCK_TOKENS

_WIDE = 4
"""So many parts of a batch are int64; they come first, so that all are aligned."""


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
    """As `pack_batch`, in parts."""
    return unpacked(*pack_batch(rows, inputs, device))


def pack_batch(
    rows: Sequence[Row], inputs: Sequence[Inputs], device: torch.device
) -> tuple[Tensor, "Sizes"]:
    """On the device, in one piece. Rows that sample do so after their last token and after each
    draft; logits are made of all inputs that a token of the prompt follows whose log probability is
    wanted.

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

    memory = packed(
        np.concatenate([np.asarray(x, np.int64) for x in tokens]),
        positions,
        block_ids * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        np.repeat(query_starts[1:], samples) - behind,
        tables,
        query_starts,
        lengths,
        pinned=device.type == "cuda",
    )
    sizes = Sizes(int(query_starts[-1]), len(behind), *tables.shape)
    return memory.to(device, non_blocking=True), sizes


class Sizes(NamedTuple):
    """Of a step: what its packed form does not say itself."""

    tokens: int
    samples: int
    rows: int
    longest_table: int

    @property
    def num_bytes(self) -> int:
        """Of the packed form."""
        wide = 3 * self.tokens + self.samples
        return 8 * wide + 4 * (self.rows * self.longest_table + 2 * self.rows + 1)


def packed(*arrays: np.ndarray, pinned: bool) -> Tensor:
    """Of `ForwardBatch`, in the order of `unpacked`: bytes of one tensor, for one copy to the
    device, which nobody waits for if its memory is pinned."""
    wide, narrow = arrays[:_WIDE], arrays[_WIDE:]
    middle = 8 * sum(array.size for array in wide)
    size = middle + 4 * sum(array.size for array in narrow)
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    into = memory.numpy()
    np.concatenate(wide, axis=None, out=into[:middle].view(np.int64))
    if narrow:
        parts = into[middle:].view(np.int32)
        np.concatenate(narrow, axis=None, out=parts, casting="same_kind")
    return memory


def unpacked(memory: Tensor, sizes: Sizes) -> ForwardBatch:
    """Views of it."""
    count, samples, rows, longest = sizes
    middle = 8 * (3 * count + samples)
    wide, narrow = memory[:middle].view(torch.int64), memory[middle:].view(torch.int32)
    tokens, positions, slots, sample_indices = wide.split_with_sizes([count] * 3 + [samples])
    block_tables, query_starts, context_lengths = narrow.split_with_sizes(
        [rows * longest, rows + 1, rows]
    )
    return ForwardBatch(
        tokens=tokens,
        positions=positions,
        slots=slots,
        block_tables=block_tables.view(rows, longest),
        query_starts=query_starts,
        context_lengths=context_lengths,
        sample_indices=sample_indices,
    )
