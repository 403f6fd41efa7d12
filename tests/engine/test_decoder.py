"""Our logits and Transformers', for every family and however the prompt comes in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.tiny import CASES, Bench, prompt_of
from slipstream.kernels.reference import Reference

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
CHUNKS = {
    "whole": [150],
    "blocks": [64, 48, 32, 6],
    "odd": [1, 30, 2, 77, 40],
    "single": [100] + [1] * 50,
}


def expected(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(saved: Saved, case: str) -> None:
    folder, model = saved(case)
    tokens = prompt_of(150)
    wanted = expected(model, tokens)
    assert wanted.std() > 0.5  # flat logits would prove nothing
    bench = Bench(folder)
    for chunks in CHUNKS.values():
        bench.taken.clear()
        table, start = bench.blocks(len(tokens)), 0
        bench.pool.fill_(torch.nan)
        for size in chunks:
            logits = bench.logits((tokens[start : start + size], start, table))
            start += size
            close(logits[0], wanted[start - 1])


@pytest.mark.parametrize("case", ["llama", "qwen3", "llama_head_dim_24"])
def test_mixed_batch(saved: Saved, case: str) -> None:
    """A decode, a chunk on top of cached blocks, a whole prompt and a one-token prompt at once."""
    folder, model = saved(case)
    bench = Bench(folder)
    first, second, third = prompt_of(83, 1), prompt_of(64, 2), prompt_of(33, 3)
    tables = [bench.blocks(len(tokens)) for tokens in (first, second, third, (5,))]
    bench.logits((first[:82], 0, tables[0]), (second[:32], 0, tables[1]))
    logits = bench.logits(
        (first[82:], 82, tables[0]),
        (second[32:], 32, tables[1]),
        (third, 0, tables[2]),
        ((5,), 0, tables[3]),
    )
    for row, tokens in enumerate((first, second, third, (5,))):
        close(logits[row], expected(model, tokens)[-1])


def test_a_prefix_is_used_where_it_lies(saved: Saved) -> None:
    folder, model = saved("llama")
    bench = Bench(folder)
    first = prompt_of(60, 1)
    other = first[:48] + prompt_of(30, 2)
    table = bench.blocks(60)
    bench.logits((first, 0, table))
    written = bench.pool[list(table)].clone()
    shared = table[:3] + bench.blocks(30)
    close(bench.logits((other[48:], 48, shared))[0], expected(model, other)[-1])
    assert torch.equal(written.nan_to_num(7), bench.pool[list(table)].nan_to_num(7))


def test_only_slots_of_the_step_are_written(saved: Saved) -> None:
    folder, _ = saved("llama")
    bench = Bench(folder)
    bench.logits((prompt_of(20), 0, (9, 4)))
    written = ~bench.pool.isnan().any(-1).any(1).any(1).any(1)  # [blocks, 16]
    wanted = torch.zeros_like(written)
    wanted[9], wanted[4, :4] = True, True
    assert torch.equal(written, wanted)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3", "llama_yarn", "mixtral"])
def test_bfloat16_is_as_close_as_transformers_is(saved: Saved, case: str) -> None:
    folder, model = saved(case)
    tokens = prompt_of(100)
    exact = expected(model, tokens)[-1]
    rough = expected(type(model).from_pretrained(folder, dtype=torch.bfloat16).eval(), tokens)[-1]
    bench = Bench(folder, torch.bfloat16)
    table = bench.blocks(100)
    bench.logits((tokens[:41], 0, table))
    ours = bench.logits((tokens[41:], 41, table))[0]
    scale = exact.std()
    assert (ours - exact).pow(2).mean().sqrt() < 2 * (rough - exact).pow(
        2
    ).mean().sqrt() + 0.01 * scale


def test_a_block_table_that_is_too_short_is_refused(saved: Saved) -> None:
    folder, _ = saved("llama")
    bench = Bench(folder)
    with pytest.raises(ValueError, match="r0: 1 blocks do not hold 17 tokens"):
        bench.logits((prompt_of(17), 0, (3,)))


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3", "llama_yarn_factors"])
def test_a_row_does_not_depend_on_batch_or_chunks(
    saved: Saved, case: str, dtype: torch.dtype, int8: bool
) -> None:
    """Bit by bit, so that a stream goes on elsewhere as it would have gone on here."""
    bench = Bench(saved(case)[0], dtype, int8=int8)
    if isinstance(bench.backend, Reference):
        pytest.skip("holds for compiled kernels alone")
    tokens, other = prompt_of(150), prompt_of(70, 1)
    table, beside = bench.blocks(150), bench.blocks(70)
    alone = {150: bench.logits((tokens, 0, table))[0]}
    written = bench.pool[list(table)].clone()
    for chunks in CHUNKS.values():
        start = 0
        bench.pool.fill_(torch.nan)
        bench.logits((other[:50], 0, beside))
        for step, size in enumerate(chunks):
            company = (other[50 : 51 + step % 20], 50, beside)
            part = (tokens[start : start + size], start, table)
            parts = [(part,), (part, company), (company, part)][step % 3]
            logits = bench.logits(*parts)[parts.index(part)]
            start += size
            assert torch.equal(alone.setdefault(start, logits), logits)
        assert torch.equal(bench.pool[list(table)].nan_to_num(9), written.nan_to_num(9))
