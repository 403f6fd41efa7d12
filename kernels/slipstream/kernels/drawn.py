"""Cases drawn from seeds for every operation, over shapes that people do not think of.

What a backend is held to, on any device: its results and the pool afterwards are those of the
reference. Tests walk through them, and `gpu.check` on a card.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.levels import Levels, in_nibbles
from slipstream.kernels.ops import (
    FLOAT8,
    NO_ADAPTER,
    NO_SLOT,
    Adapters,
    Backend,
    ForwardBatch,
    Heads,
    LowRank,
    Model,
    stored,
)

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 1.6e-2)}
"""Relative and absolute, of results."""
BLOCK_TOKENS = 16
EPSILON = 1e-5
HEAD_DIMS = (16, 32, 64, 80, 96, 128)


class Case(NamedTuple):
    """A model on a backend, and one step's arguments."""

    build: Callable[[Backend], Model]
    batch: ForwardBatch
    cosine: Tensor
    sine: Tensor
    pool: Tensor


def batch_of(
    num_tokens: int, samples: list[int], device: torch.device | None = None, **tensors: Tensor
) -> ForwardBatch:
    """The i-th token is i, so that `embed` of any matrix brings it in."""
    one_row = {
        "positions": torch.arange(num_tokens),
        "slots": torch.arange(num_tokens),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32),
        "query_starts": torch.tensor([0, num_tokens], dtype=torch.int32),
        "context_lengths": torch.tensor([num_tokens], dtype=torch.int32),
    }
    parts = {
        "tokens": torch.arange(num_tokens),
        "sample_indices": torch.tensor(samples, dtype=torch.int64),
        **one_row,
        **tensors,
    }
    return ForwardBatch(**{name: tensor.to(device) for name, tensor in parts.items()})


def brought_in(x: Tensor, then: Callable[[Any, Any], Any]) -> Callable[[Backend], Model]:
    def build(backend: Backend) -> Model:
        packed = backend.table(x)
        return lambda ops: then(ops, ops.embed(packed))

    return build


class Shapes:
    """A small model around one operation, and random arguments, from one seed."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kv_dtype: torch.dtype | None = None,
        head_dims: Sequence[int] = HEAD_DIMS,
    ) -> None:
        """`kv_dtype`: of the pool, `dtype` unless given."""
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.kv_dtype, self.head_dims = kv_dtype or dtype, head_dims

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def tokens(self) -> int:
        return self.random.choice([1, 2, 3, 7, 8, 9, 33, 65, 130])

    def size(self) -> int:
        return self.random.choice([16, 32, 48, 64, 80, 576, 1024])

    def plain(self, build: Callable[[Backend], Model], num_tokens: int) -> Case:
        order = self.random.sample(range(num_tokens), self.random.randint(0, num_tokens))
        nothing = torch.zeros(num_tokens, 8, device=self.device)
        pool = torch.zeros(1, 1, 2, 1, BLOCK_TOKENS, 16, dtype=self.dtype, device=self.device)
        return Case(build, batch_of(num_tokens, order, self.device), nothing, nothing, pool)

    def embed(self) -> Case:
        count, width = self.tokens(), self.size()
        table = self.normal(count + 5, width)
        return self.plain(brought_in(table, lambda ops, x: x), count)

    def take(self) -> Case:
        count, width = self.tokens(), self.size()
        table = self.normal(count, width)
        return self.plain(brought_in(table, lambda ops, x: ops.take(x)), count)

    def rms_norm(self) -> Case:
        count, width = self.tokens(), self.size()
        x, weight = self.normal(count, width), self.normal(width)
        model = brought_in(x, lambda ops, x: ops.rms_norm(x, weight, EPSILON))
        return self.plain(model, count)

    def rms_norm_of_a_sum(self) -> Case:
        """And the sum stays in the residual."""
        count, width = self.tokens(), self.size()
        x, y, weight = self.normal(count, width), self.normal(count, width), self.normal(width)
        wants_sum = self.random.random() < 0.5

        def build(backend: Backend) -> Model:
            packed = backend.table(x), backend.table(y)

            def model(ops: Any) -> Any:
                delta, stream = map(ops.embed, packed)
                normed = ops.rms_norm(delta, weight, EPSILON, stream)
                return stream if wants_sum else normed

            return model

        return self.plain(build, count)

    def linear(self) -> Case:
        count, inputs = self.tokens(), self.size()
        outputs = self.random.choice([1, 15, 16, 17, 48, 49, 96, 199, 576])
        x, weight = self.normal(count, inputs), self.normal(outputs, inputs) / inputs**0.5
        bias = self.normal(outputs) if self.random.random() < 0.5 else None
        wide = self.random.random() < 0.3

        def build(backend: Backend) -> Model:
            packed = backend.table(x), backend.pack(weight, bias)
            return lambda ops: ops.linear(ops.embed(packed[0]), packed[1], wide)

        return self.plain(build, count)

    def gated(self) -> Case:
        count, inputs, outputs = self.tokens(), self.size(), self.size()
        x, weight = self.normal(count, inputs), self.normal(2 * outputs, inputs) / inputs**0.5
        bias = self.normal(2 * outputs) if self.random.random() < 0.5 else None

        def build(backend: Backend) -> Model:
            packed = backend.table(x), backend.pack_gated(weight, bias)
            return lambda ops: ops.gated(ops.embed(packed[0]), packed[1])

        return self.plain(build, count)

    def levels(self, outputs: int, inputs: int) -> Levels:
        """As some quantizer might have left it."""
        kind = self.random.choice([torch.uint8, torch.uint8, torch.int8, FLOAT8])
        group = self.random.choice([16, 32, 64, 96, 128, inputs])
        size = (outputs, -(-inputs // group))
        low, high = (0, 16) if kind == torch.uint8 else (-128, 128)
        drawn = torch.randint(low, high, (outputs, inputs), generator=self.generator)
        zero = torch.randint(low, high, size, generator=self.generator).to(torch.int8)
        scale = torch.rand(size, generator=self.generator) / ((high - low) * inputs**0.5)
        order = torch.randperm(inputs, generator=self.generator)
        levels = in_nibbles(drawn.to(kind)) if kind == torch.uint8 else drawn.to(kind)
        halved = scale.to(self.random.choice([torch.float16, torch.bfloat16, torch.float32]))
        has_zero, has_order = self.random.random() < 0.5, self.random.random() < 0.3
        return Levels(
            levels.to(self.device),
            halved.to(self.device),
            zero.to(self.device) if has_zero and kind != FLOAT8 else None,
            inputs,
            group,
            self.dtype,
            order.to(self.device) if has_order else None,
        )

    def quantized(self) -> Case:
        """`linear` of levels."""
        count, inputs = self.tokens(), self.size()
        outputs = self.random.choice([1, 15, 16, 17, 48, 49, 96, 199, 576])
        return self._product(count, self.levels(outputs, inputs), gated=False)

    def quantized_gated(self) -> Case:
        count, inputs, outputs = self.tokens(), self.size(), self.size()
        return self._product(count, self.levels(2 * outputs, inputs), gated=True)

    def quantized_rows(self, kind: torch.dtype = torch.int8) -> Case:
        """Levels of 8 bits, whose inputs are quantized too."""
        count, inputs, outputs = self.tokens(), self.size(), self.size()
        drawn = torch.randint(-128, 128, (2 * outputs, inputs), generator=self.generator)
        scale = torch.rand(2 * outputs, 1, generator=self.generator) / (127 * inputs**0.5)
        levels, scale = drawn.to(kind).to(self.device), scale.to(self.device)
        weight = Levels(levels, scale, None, inputs, inputs, self.dtype, rows=True)
        return self._product(count, weight, gated=self.random.random() < 0.5)

    def quantized_rows_of_float8(self) -> Case:
        return self.quantized_rows(FLOAT8)

    def _product(self, count: int, weight: Levels, gated: bool) -> Case:
        x = self.normal(count, weight.inputs)
        bias = self.normal(weight.outputs) if self.random.random() < 0.5 else None
        wide = self.random.random() < 0.3

        def build(backend: Backend) -> Model:
            table = backend.table(x)
            if gated:
                both = backend.pack_gated(weight, bias)
                return lambda ops: ops.gated(ops.embed(table), both)
            packed = backend.pack(weight, bias)
            return lambda ops: ops.linear(ops.embed(table), packed, wide)

        return self.plain(build, count)

    def adapted_samples(self) -> Case:
        return self.adapted_linear(lambda ops, x: ops.take(x))

    def adapted_linear(self, of: Callable[[Any, Any], Any] = lambda ops, x: x) -> Case:
        parts = [self.random.choice([16, 48, 112]) for _ in range(self.random.choice([1, 2, 3]))]
        count, inputs = self.tokens(), self.size()
        x, weight = self.normal(count, inputs), self.normal(sum(parts), inputs) / inputs**0.5
        bias = self.normal(sum(parts)) if self.random.random() < 0.5 else None
        places = self.places(parts, inputs)

        def build(backend: Backend) -> Model:
            table, packed = backend.table(x), backend.pack(weight, bias)
            adapters = self.adapters(backend, parts, places)
            return lambda ops: ops.linear(of(ops, ops.embed(table)), packed, adapters=adapters)

        return self.wanting(self.plain(build, count), places)

    def adapted_gated(self) -> Case:
        count, inputs = self.tokens(), self.size()
        parts = [self.random.choice([16, 80, 576])] * 2
        x, weight = self.normal(count, inputs), self.normal(sum(parts), inputs) / inputs**0.5
        places = self.places(parts, inputs)

        def build(backend: Backend) -> Model:
            table, packed = backend.table(x), backend.pack_gated(weight)
            adapters = self.adapters(backend, parts, places, gated=True)
            return lambda ops: ops.gated(ops.embed(table), packed, adapters)

        return self.wanting(self.plain(build, count), places)

    def places(self, parts: Sequence[int], inputs: int) -> list[LowRank | None]:
        """Some are free, of some the rank is none that kernels like."""
        ranks = self.random.choices([None, 1, 3, 8, 16, 20, 64], k=self.random.choice([1, 2, 5]))
        return [
            None
            if rank is None
            else LowRank(
                down=self.normal(len(parts) * rank, inputs) / inputs**0.5,
                up=self.normal(sum(parts), rank) / rank**0.5,
                scale=torch.rand(len(parts), generator=self.generator).to(self.device),
            )
            for rank in ranks
        ]

    def adapters(
        self,
        backend: Backend,
        parts: Sequence[int],
        places: Sequence[LowRank | None],
        gated: bool = False,
    ) -> Adapters:
        inputs = next((low.down.shape[1] for low in places if low), 16)
        adapters = backend.adapters(parts, inputs, len(places), 64, gated)
        for place, low in enumerate(places):
            adapters.put(place, None if low is None else adapters.pack(low))
        return adapters

    def wanting(self, case: Case, places: Sequence[LowRank | None]) -> Case:
        """Tokens of several adapters, of none, in runs and by turns."""
        wanted = range(NO_ADAPTER, len(places))
        count, run = len(case.batch.tokens), self.random.choice([1, 1, 5, 40])
        chosen = [self.random.choice(wanted) for _ in range(-(-count // run)) for _ in range(run)]
        adapters = torch.tensor(chosen[:count], dtype=torch.int32, device=self.device)
        return case._replace(batch=replace(case.batch, adapters=adapters))

    def attention(self) -> Case:
        kv_heads = self.random.choice([1, 2, 3, 5])
        group = self.random.choice([1, 2, 3, 7, 40])
        heads = Heads(kv_heads * group, kv_heads, self.random.choice(self.head_dims))
        rows = self.random.choice([1, 2, 5])
        contexts = [self.random.choice([1, 2, 15, 16, 17, 63, 64, 65, 150]) for _ in range(rows)]
        counts = [min(self.random.choice([1, 1, 2, 99, c // 2 + 1]), c) for c in contexts]
        width = -(-max(contexts) // BLOCK_TOKENS) + self.random.choice([0, 2])
        tables = torch.randperm(rows * width, generator=self.generator).int().view(rows, width)
        layer = self.random.randrange(2)
        wide = self.normal(rows * width, 2, 2, kv_heads, BLOCK_TOKENS, heads.dim).cpu()
        slots = []
        for row, (count, context) in enumerate(zip(counts, contexts, strict=True)):
            at = [int(tables[row, i // 16]) * 16 + i % 16 for i in range(width * BLOCK_TOKENS)]
            slots += at[context - count : context]
            for slot in at[context - count :]:  # what is not yet written may be anything
                wide[slot // 16, :, :, :, slot % 16] = torch.nan
        norms = (self.normal(heads.dim), self.normal(heads.dim))
        chosen = norms if self.random.random() < 0.5 else None
        x = self.normal(sum(counts), (heads.query + 2 * kv_heads) * heads.dim)
        angles = 7 * torch.randn(sum(counts), heads.dim // 2, generator=self.generator)
        batch = batch_of(
            sum(counts),
            [],
            self.device,
            slots=torch.tensor(slots),
            block_tables=tables,
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lengths=torch.tensor(contexts, dtype=torch.int32),
        )

        build = brought_in(x, lambda ops, x: ops.attention(x, heads, layer, chosen, EPSILON))
        angles, pool = angles.to(self.device), stored(wide, self.kv_dtype).to(self.device)
        return Case(build, batch, angles.cos(), angles.sin(), pool)

    def padding(self) -> Case:
        """Attention, with rows behind it that are none."""
        build, batch, cosine, sine, pool = self.attention()
        rows = self.random.choice([1, 3])

        def behind(x: Tensor, value: int) -> Tensor:
            return torch.cat((x, x.new_full((rows, *x.shape[1:]), value)))

        ends = batch.query_starts[-1] + torch.arange(1, rows + 1, device=self.device)
        padded = replace(
            batch,
            tokens=behind(batch.tokens, 0),
            positions=behind(batch.positions, 0),
            slots=behind(batch.slots, NO_SLOT),
            block_tables=behind(batch.block_tables, 0),
            query_starts=torch.cat((batch.query_starts, ends.int())),
            context_lengths=behind(batch.context_lengths, 0),
        )
        return Case(build, padded, behind(cosine, 1), behind(sine, 0), pool)


ADAPTED = ("adapted_linear", "adapted_samples", "adapted_gated")
CASES = (
    *("embed", "take", "rms_norm", "rms_norm_of_a_sum", "linear", "gated", "attention"),
    *("quantized", "quantized_gated", *ADAPTED),
)
"""Methods of `Shapes`, of what every backend can do."""


def outcome(backend: Backend, case: Case) -> tuple[Tensor, Tensor]:
    """The result, and the pool afterwards."""
    pool = case.pool.clone()
    model = case.build(backend)
    result = backend.compile(model)(case.batch, case.cosine, case.sine, pool)
    return result.clone(), pool
