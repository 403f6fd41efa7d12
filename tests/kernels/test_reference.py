"""What only the reference computes, against its formula written down for one token at a time."""

import math
import random

import pytest
import torch
from torch import Tensor

from slipstream.kernels.ops import Experts, ForwardBatch, Scoring, SharedExpert
from slipstream.kernels.reference import attend, moe

SEEDS = range(25)
BLOCK_TOKENS = 16


class Attention:
    """A batch of drawn shape over a pool whose other slots are NaN."""

    def __init__(self, seed: int) -> None:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kv_heads, self.group = draw.choice([1, 2, 3]), draw.choice([1, 2, 7])
        heads, dim = self.kv_heads * self.group, draw.choice([8, 16, 80])
        self.contexts = [draw.choice([1, 2, 16, 17, 33, 70]) for _ in range(draw.choice([1, 2, 4]))]
        self.counts = [min(draw.choice([1, 1, 5, 99]), context) for context in self.contexts]
        blocks = -(-max(self.contexts) // BLOCK_TOKENS)
        tables = torch.randperm(len(self.contexts) * blocks, generator=generator)
        self.tables = tables.view(len(self.contexts), blocks)
        self.pool = torch.full((tables.numel(), 2, 2, self.kv_heads, BLOCK_TOKENS, dim), torch.nan)
        self.keys = []
        for row, context in enumerate(self.contexts):
            both = torch.randn(2, self.kv_heads, context, dim, generator=generator)
            self.keys.append(both)
            for at in range(context):
                block = int(self.tables[row, at // BLOCK_TOKENS])
                self.pool[block, 1, :, :, at % BLOCK_TOKENS] = both[:, :, at]
        self.query = torch.randn(sum(self.counts), heads, dim, generator=generator)
        sinks = torch.randn(heads, generator=generator) if draw.random() < 0.5 else None
        self.how = Scoring(
            scale=draw.choice([dim**-0.5, 0.3]),
            window=draw.choice([0, 1, 7, 16, 17]),
            chunk=draw.choice([0, 0, 16, 20]),
            softcap=draw.choice([0.0, 2.0]),
            sinks=sinks,
        )
        nothing = torch.zeros(0, dtype=torch.int64)
        own = [
            (row, position)
            for row, (context, count) in enumerate(zip(self.contexts, self.counts, strict=True))
            for position in range(context - count, context)
        ]
        new = [self.keys[row][:, :, position] for row, position in own]
        self.key, self.value = torch.stack(new, 1)
        slots = [int(self.tables[row, at // BLOCK_TOKENS]) * 16 + at % 16 for row, at in own]
        for slot in slots:  # they are written now
            self.pool[slot // 16, 1, :, :, slot % 16] = torch.nan
        self.batch = ForwardBatch(
            *(nothing, nothing, torch.tensor(slots), self.tables.int()),
            query_starts=torch.tensor([0, *self.counts]).cumsum(0).int(),
            context_lengths=torch.tensor(self.contexts, dtype=torch.int32),
            sample_indices=nothing,
        )

    def one(self, row: int, position: int, query: Tensor, head: int) -> Tensor:
        """What a head of the token at `position` attends to."""
        key, value = self.keys[row][:, head // self.group]
        how, scores = self.how, []
        seen = [
            other
            for other in range(position + 1)
            if (not how.window or position - other < how.window)
            and (not how.chunk or position // how.chunk == other // how.chunk)
        ]
        for other in seen:
            score = float(query @ key[other]) * how.scale
            scores.append(how.softcap * math.tanh(score / how.softcap) if how.softcap else score)
        total = sum(math.exp(score) for score in scores)
        total += math.exp(float(how.sinks[head])) if how.sinks is not None else 0
        weighed = [math.exp(s) / total * value[o] for s, o in zip(scores, seen, strict=True)]
        return torch.stack(weighed).sum(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_chunks_caps_and_sinks(seed: int) -> None:
    case, at = Attention(seed), 0
    made = attend(case.batch, case.query, case.key, case.value, case.pool, 1, case.how)
    for row, (context, count) in enumerate(zip(case.contexts, case.counts, strict=True)):
        for position in range(context - count, context):
            for head in range(case.query.shape[1]):
                wanted = case.one(row, position, case.query[at, head], head)
                torch.testing.assert_close(made[at, head], wanted, rtol=1e-4, atol=1e-5)
            at += 1


def drawn_experts(seed: int) -> tuple[Tensor, Experts]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    count, hidden, inner = draw.choice([2, 3, 8, 30]), draw.choice([8, 24]), draw.choice([8, 40])
    shared = SharedExpert(normal(24, hidden), normal(hidden, 12), normal(1, hidden))
    experts = Experts(
        router=3 * normal(count, hidden),
        gate_up=normal(count, 2 * inner, hidden),
        down=normal(count, hidden, inner),
        first=0,
        top_k=draw.randint(1, min(count, 4)),
        normalized=draw.random() < 0.5,
        shared=shared if draw.random() < 0.5 else None,
    )
    return normal(draw.choice([0, 1, 2, 7, 65]), hidden) * hidden**0.5, experts


def said_of(x: Tensor, experts: Experts) -> Tensor:
    """Of one token."""

    def mlp(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ x).chunk(2)
        return down @ (gate * gate.sigmoid() * up)

    shares = torch.softmax(experts.router @ x, 0)
    chosen = sorted(range(len(shares)), key=lambda i: -float(shares[i]))[: experts.top_k]
    total = float(sum(shares[i] for i in chosen)) if experts.normalized else 1.0
    out = sum(
        (mlp(experts.gate_up[i], experts.down[i]) * shares[i] / total for i in chosen),
        torch.zeros_like(x),
    )
    if experts.shared is None:
        return out
    gate = (experts.shared.gate @ x).sigmoid()
    return out + gate * mlp(experts.shared.gate_up, experts.shared.down)


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_are_those_of_each_token(seed: int) -> None:
    x, experts = drawn_experts(seed)
    wanted = torch.stack([said_of(token, experts) for token in x]) if len(x) else x
    torch.testing.assert_close(moe(x, experts), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_the_experts_say_parts_of_it(seed: int) -> None:
    """Where a part has none of a token's experts, it says nothing, and nothing leaks in."""
    x, experts = drawn_experts(seed)
    experts = experts._replace(shared=None)
    cut = random.Random(seed).randint(1, len(experts.down) - 1)
    parts = [
        experts._replace(gate_up=experts.gate_up[own], down=experts.down[own], first=own.start)
        for own in (slice(0, cut), slice(cut, len(experts.down)))
    ]
    made = sum(moe(x, part) for part in parts)
    torch.testing.assert_close(made, moe(x, experts), rtol=1e-4, atol=1e-5)
