"""Attention alone, whole steps of decoding and of prompts, sampling: by the runner that serves."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.engine.batch import Inputs, build_batch
from slipstream.engine.model_config import ModelConfig, ServedModel
from slipstream.engine.rope import Rope
from slipstream.engine.runner import Runner, allocate_pool, choose_backend
from slipstream.kernels.draw import Draw
from slipstream.kernels.ops import Heads
from slipstream.loadtest.gpu import results
from slipstream.loadtest.gpu.floors import BANDWIDTH, DEVICE, MATRICES, median_ms
from slipstream.loadtest.gpu.results import rate_row, time_row
from slipstream.loadtest.gpu.shapes import ELEMENT_BYTES, Shape
from slipstream.types import BLOCK_TOKENS, SamplingParams

Tell = Callable[[results.Row], None]

ATTENTION = ((64, 1024), (64, 4096), (32, 8192), (16, 16_384), (8, 32_768), (1, 32_768))
"""Streams, and the context of each."""
DECODE = ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096))
PROMPTS = (512, 2048, 8192)
LONG_CONTEXT = 4096
STEPS, WARM_STEPS = 20, 6
GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)


def shape_of(config: ServedModel) -> Shape:
    assert isinstance(config, ModelConfig), "not the native decoder"
    return Shape(
        *("", config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads),
        *(config.num_kv_heads, config.head_dim, config.vocab_size),
    )


def tables(rows: int, context: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Blocks of each stream, in no order at all."""
    each = -(-context // BLOCK_TOKENS)
    blocks = list(range(rows * each))
    random.Random(seed).shuffle(blocks)
    return [tuple(blocks[i * each : (i + 1) * each]) for i in range(rows)]


def filled(pool: Tensor) -> Tensor:
    """With noise: zeros are faster than what they stand for."""
    for first in range(0, len(pool), 1024):
        pool[first : first + 1024].normal_()
    return pool


def attention(folder: Path, floors: dict[str, float], tell: Tell) -> None:
    """One layer's, with the rotary embedding and the writing of keys and values that come with it;
    what is read of the context is the floor."""
    config = ModelConfig.read(folder, dummy=True)
    backend = choose_backend(config, torch.bfloat16, DEVICE)
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    width = (heads.query + 2 * heads.kv) * heads.dim
    table = backend.table(torch.randn(256, width, device=DEVICE).bfloat16())
    program = backend.compile(
        lambda ops: ops.take(ops.attention(ops.embed(table), heads, 0, None, 1e-5))
    )
    rope = Rope(config.rope, config.head_dim, DEVICE)
    for rows, context in ATTENTION:
        blocks = tables(rows, context)
        shape = (rows * len(blocks[0]), 1, 2, heads.kv, BLOCK_TOKENS, heads.dim)
        pool = filled(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))
        streams = [
            Row(str(i), 1, (i % 256,), context - 1, table_, True) for i, table_ in enumerate(blocks)
        ]
        inputs = [Inputs(row.tokens, row.start) for row in streams]
        batch = build_batch(streams, inputs, DEVICE)
        angles = rope.angles(batch.positions)
        with torch.inference_mode():
            ms = median_ms(partial(program, batch, *angles, pool))
        num_bytes = rows * context * 2 * heads.kv * heads.dim * ELEMENT_BYTES
        floor_ms = num_bytes / floors[BANDWIDTH] / 1e6
        wanted = 0.8 if context >= LONG_CONTEXT and rows > 1 else 0.0
        tell(time_row(f"{rows} x {context} tokens", ms, floor_ms, wanted))
        del pool


class Bench:
    """The runner, with random weights and room for the largest of these steps."""

    def __init__(self, folder: Path, num_blocks: int, streams: int) -> None:
        self.runner = Runner(folder, "bfloat16", DEVICE, dummy=True)
        layout = self.runner.layout
        self.runner.attach(filled(allocate_pool(layout, num_blocks, DEVICE)))
        self.runner.prepare(streams)
        self._number = 0

    def decode_ms(self, rows: int, context: int) -> float:
        """Of a step in a row of steps, each launched before the one before it is read."""
        blocks = tables(rows, context + WARM_STEPS + STEPS + BLOCK_TOKENS)
        prompt = tuple(range(context))
        self._number += 1
        names = [f"{self._number}-{i}" for i in range(rows)]
        first = [
            Row(name, 1, prompt[-1:], context - 1, table, True)
            for name, table in zip(names, blocks, strict=True)
        ]
        admitted = tuple(Admission(name, 1, prompt, context, GREEDY) for name in names)
        flying = self.runner.launch(BatchPlan(0, tuple(first), admitted))
        began_s = 0.0
        for step in range(1, WARM_STEPS + STEPS + 1):
            if step == WARM_STEPS + 1:
                began_s = time.perf_counter()
            following = tuple(
                Row(name, 1, (), context + step - 1, table, True, step, after_previous=True)
                for name, table in zip(names, blocks, strict=True)
            )
            launched = self.runner.launch(BatchPlan(step, following))
            flying.finish()
            flying = launched
        flying.finish()
        taken_s = time.perf_counter() - began_s
        self.runner.run(BatchPlan(0, (), dropped=tuple((name, 1) for name in names)))
        return taken_s / STEPS * 1e3

    def prompt_ms(self, tokens: int, times: int = 5) -> float:
        (blocks,) = tables(1, tokens)
        taken = []
        for _ in range(times + 1):
            self._number += 1
            name, prompt = str(self._number), tuple(random.choices(range(1000), k=tokens))
            row = Row(name, 1, prompt, 0, blocks, True)
            plan = BatchPlan(0, (row,), (Admission(name, 1, prompt, tokens, GREEDY),))
            began_s = time.perf_counter()
            self.runner.run(plan)
            taken.append(time.perf_counter() - began_s)
            self.runner.run(BatchPlan(0, (), dropped=((name, 1),)))
        return sorted(taken[1:])[times // 2] * 1e3


def decode(folder: Path, floors: dict[str, float], tell: Tell) -> None:
    most = max(rows * (context + 64) for rows, context in DECODE)
    bench = Bench(folder, most // BLOCK_TOKENS + max(rows for rows, _ in DECODE), 256)
    shape = shape_of(bench.runner.config)
    for rows, context in DECODE:
        ms = bench.decode_ms(rows, context)
        floor_ms = shape.decode_bytes(rows, context) / floors[BANDWIDTH] / 1e6
        wanted = 0.7 if (rows, context) == (64, 1024) else 0.0
        note = f"{rows / ms * 1e3:.0f} tokens/s"
        tell(time_row(f"{rows} streams at {context} tokens", ms, floor_ms, wanted, note))


def prefill(folder: Path, floors: dict[str, float], tell: Tell) -> None:
    bench = Bench(folder, max(PROMPTS) // BLOCK_TOKENS + 1, 1)
    shape = shape_of(bench.runner.config)
    for tokens in PROMPTS:
        ms = bench.prompt_ms(tokens)
        rate = shape.prompt_operations(tokens) / ms / 1e9
        wanted = 0.55 if tokens >= 2048 else 0.0
        note = f"{tokens / ms * 1e3:.0f} tokens/s"
        name = f"a prompt of {tokens} tokens"
        tell(rate_row(name, rate, "TFLOP/s", floors[MATRICES], wanted, note))


def sampling(folder: Path, floors: dict[str, float], tell: Tell) -> None:
    config = ModelConfig.read(folder, dummy=True)
    backend = choose_backend(config, torch.bfloat16, DEVICE)
    kinds: Sequence[tuple[str, Draw]] = (
        ("greedy", Draw(0)),
        ("temperature", Draw(0, 1.0)),
        ("top-k 50", Draw(0, 1.0, 50)),
        ("top-p 0.9", Draw(0, 1.0, 0, 0.9)),
        ("top-k 50, top-p 0.9, min-p 0.05", Draw(0, 0.8, 50, 0.9, 0.05)),
    )
    for rows in (1, 64, 256):
        logits = torch.randn(rows, config.vocab_size, device=DEVICE) * 4
        floor_ms = logits.nbytes / floors[BANDWIDTH] / 1e6
        for name, kind in kinds:
            draws = [kind._replace(row=row, point=(row + 0.5) / rows) for row in range(rows)]
            with torch.inference_mode():
                ms = median_ms(partial(backend.draw_async, logits, draws))
            tell(time_row(f"{rows} rows, {name}", ms, floor_ms))
