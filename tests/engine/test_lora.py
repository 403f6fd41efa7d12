"""LoRA adapters: the tokens of PEFT's `generate`, whoever shares the batch and however it came."""

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.architectures import tiny_config, tiny_model
from engine.tiny import Bench, greedy, prompt_of, scrambled_blocks
from engine.tiny_lora import expected, save_adapter
from slipstream.core.machine import Admission, BatchPlan, Row, RowOutput
from slipstream.engine.batch import Inputs, build_batch
from slipstream.engine.lora import CONFIG, PICKLE, WEIGHTS, LoraLimits, Low, read_lora
from slipstream.engine.models import read_model
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.errors import ErrorCode
from slipstream.kernels.build import VARIABLE
from slipstream.kernels.ops import NO_ADAPTER, Quantization
from slipstream.kernels.reference import Reference

Saved = Callable[[str], tuple[Path, PreTrainedModel]]
COUNT = 12
BLOCKS = 96
LAYER = "model.layers.0"
"""Of what many refusals name."""


class Wish(NamedTuple):
    """One request, as it is cut into steps."""

    prompt: tuple[int, ...]
    adapter: str = ""
    chunks: tuple[int, ...] = ()
    """Tokens of its first steps; what is left comes with the last one."""


def runner_for(
    folder: Path, limits: LoraLimits | None = None, quantization: Quantization = "none"
) -> Runner:
    config = read_model(folder)
    pool = allocate_pool(config.kv_layout("float32"), BLOCKS).fill_(torch.nan)
    how: Any = {"quantization": quantization, "config": config, "lora": limits or LoraLimits()}
    return Runner(folder, "float32", pool, 2, **how)


def load(runner: Runner, name: str, folder: Path) -> str:
    """Its id."""
    read = runner.adapters.read(name, str(folder))
    assert read.adapter is not None, read.problem
    runner.adapters.put(read.adapter.adapter_id)
    return read.adapter.adapter_id


def refusal(runner: Runner, folder: Path | str, name: str = "a") -> str:
    read = runner.adapters.read(name, str(folder))
    assert read.adapter is None and read.problem is not None, "it was taken"
    assert read.problem.code is ErrorCode.INVALID_VALUE and read.problem.param == "lora_path"
    assert "\n" not in read.problem.message
    return read.problem.message


def admitted(name: str, wish: Wish) -> Admission:
    return Admission(name, 1, wish.prompt, len(wish.prompt), greedy(), wish.adapter)


def answers(
    runner: Runner, wishes: Mapping[str, Wish], count: int = COUNT
) -> dict[str, tuple[int, ...]]:
    """All in one batch, from the first chunks to the last token."""
    taken: set[int] = set()
    tables = {
        name: scrambled_blocks(len(wish.prompt) + count, taken, BLOCKS)
        for name, wish in wishes.items()
    }
    made: dict[str, list[int]] = {name: [] for name in wishes}
    done = dict.fromkeys(wishes, 0)
    step = 0
    while any(len(each) < count for each in made.values()):
        rows = []
        for name, (prompt, _, chunks) in wishes.items():
            table, start = tables[name], done[name]
            if start < len(prompt):
                size = chunks[step] if step < len(chunks) else len(prompt)
                end = min(start + size, len(prompt))
                rows.append(Row(name, 1, prompt[start:end], start, table, end == len(prompt)))
                done[name] = end
            elif len(made[name]) < count:
                position = len(made[name])
                at = len(prompt) + position - 1
                rows.append(Row(name, 1, (), at, table, True, position, after_previous=True))
        new = tuple(admitted(*each) for each in wishes.items()) if not step else ()
        for output in runner.run(BatchPlan(step, tuple(rows), new)):
            assert output.problem is None
            made[output.request_id] += output.tokens
        step += 1
    runner.run(BatchPlan(step, (), dropped=tuple((name, 1) for name in wishes)))
    return {name: tuple(tokens) for name, tokens in made.items()}


CHUNKS = ((7,), (), (16, 8), (1, 2), (40, 3))
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 16},
        "alpha_pattern": {"up_proj": 40, r"layers\.[02]\.mlp\.gate_proj": 2},
        "target_modules": r".*\.(q|k|o|up|gate)_proj",
    },
    "linear": {"target_modules": "all-linear", "r": 16},
    "layers": {"layers_to_transform": [0, 2], "exclude_modules": ["k_proj"]},
}
"""Of adapters that are mixed in one batch."""


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        *((case, "") for case in ("llama", "llama_tied", "qwen3", "llama_biases")),
        *(("llama_head_dim_24", ""), ("qwen2", "triton")),
    ],
)
def test_tokens_are_those_of_peft(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, kernels: str
) -> None:
    """Five adapters and none in one batch, in chunks, joining late; then each alone."""
    if kernels:  # a GPU's, interpreted
        monkeypatch.setenv(VARIABLE, kernels)
    folder, model = saved(case)
    runner, count = runner_for(folder), 4 if kernels else COUNT
    oracles: dict[str, Any] = {"": model}
    ids = {"": ""}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        oracles[name] = save_adapter(tmp_path / name, model, seed, **settings)
        ids[name] = load(runner, name, tmp_path / name)
    wishes = {
        "plain": Wish(prompt_of(40, 1), ids[""], (16,)),
        **{
            name: Wish(prompt_of(30 + 9 * index, index), ids[name], CHUNKS[index])
            for index, name in enumerate(SETTINGS)
        },
        "again": Wish(prompt_of(21, 9), ids["all"]),
    }
    of = {
        name: name if name in SETTINGS else {"plain": "", "again": "all"}[name] for name in wishes
    }
    wanted = {
        name: expected(oracles[of[name]], wish.prompt, count) for name, wish in wishes.items()
    }
    assert len({wanted["all"], expected(model, wishes["all"].prompt, count)}) == 2
    assert answers(runner, wishes, count) == wanted
    for name, wish in list(wishes.items())[: 2 if kernels else None]:
        assert answers(runner, {name: wish._replace(chunks=())}, count) == {name: wanted[name]}
    merged = oracles["all"].merge_and_unload()
    assert expected(merged, wishes["all"].prompt, count) == wanted["all"]


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_beside_experts_attention_is_adapted(saved: Saved, tmp_path: Path, case: str) -> None:
    folder, model = saved(case)
    runner = runner_for(folder)
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    oracle = save_adapter(tmp_path, model, **settings)
    wish = Wish(prompt_of(30), load(runner, "a", tmp_path))
    both = answers(runner, {"a": wish, "plain": wish._replace(adapter="")})
    assert both == {
        "a": expected(oracle, wish.prompt, COUNT),
        "plain": expected(model, wish.prompt, COUNT),
    }


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "olmo2", "gpt2"])
def test_what_transformers_computes_is_adapted_too(tmp_path: Path, model_type: str) -> None:
    tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    # A list for many models, of which this one has some.
    names = ["c_attn", "c_proj", "c_fc", "q_proj", "qkv_proj", "v_proj", "o_proj", "down_proj"]
    oracle = save_adapter(tmp_path / "a", model, target_modules=names)
    runner = runner_for(tmp_path / "model")
    wish = Wish(prompt_of(30), load(runner, "a", tmp_path / "a"), (16,))
    both = answers(runner, {"a": wish, "plain": wish._replace(adapter="")})
    assert both["a"] == expected(oracle, wish.prompt, COUNT)
    assert both["plain"] == expected(model, wish.prompt, COUNT) != both["a"]


def test_blocks_of_an_adapter_serve_prefixes_and_other_workers(
    saved: Saved, tmp_path: Path
) -> None:
    """What was computed with it lies in the pool: another worker goes on from there."""
    folder, model = saved("llama")
    first, second = runner_for(folder), runner_for(folder)
    oracle = save_adapter(tmp_path, model)
    adapter = load(first, "a", tmp_path)
    assert load(second, "a", tmp_path) == adapter
    prompt, table = prompt_of(60), tuple(range(10))
    row = Row("p", 1, prompt[:48], 0, table, False)
    first.run(BatchPlan(0, (row,), (admitted("p", Wish(prompt, adapter)),)))
    second._pool[list(table)] = first._pool[list(table)]
    wanted = expected(oracle, prompt, 2)
    for runner in (first, second):
        rest = Row("q", 1, prompt[48:], 48, table, True)
        (output,) = runner.run(BatchPlan(1, (rest,), (admitted("q", Wish(prompt, adapter)),)))
        assert output.tokens == wanted[:1]
        after = Row("q", 1, (), 60, table, True, 1, after_previous=True)
        (output,) = runner.run(BatchPlan(2, (after,)))
        assert output.tokens == wanted[1:]


# --- A row and its neighbours ---------------------------------------------------------------------


class AdaptedBench(Bench):
    """Two random adapters, in places 0 and 2."""

    def adapt(self) -> None:
        adapters: Any = self.decoder.adapters(3, 16)
        dtype = self.pool.dtype
        for place, rank in ((0, 4), (2, 16)):
            generator = torch.Generator().manual_seed(rank)
            lows = {
                name: Low(
                    (torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(dtype),
                    (torch.randn(outputs, rank, generator=generator) * 0.3).to(dtype),
                    0.7,
                )
                for name, (outputs, inputs) in adapters.modules.items()
            }
            adapters.put(place, adapters.pack(lows))

    def step(self, *parts: tuple[tuple[int, ...], int, tuple[int, ...], int]) -> Tensor:
        """As `logits`; last of a part: its adapter's place."""
        rows = [
            Row(f"r{i}", 1, tokens, start, table, True)
            for i, (tokens, start, table, _) in enumerate(parts)
        ]
        batch = build_batch(rows, [Inputs(r.tokens, r.start) for r in rows], torch.device("cpu"))
        places = [place for tokens, _, _, place in parts for _ in tokens]
        if max(places) != NO_ADAPTER:
            batch = replace(batch, adapters=torch.tensor(places, dtype=torch.int32))
        with torch.inference_mode():
            return self.decoder.forward(batch, self.pool).clone()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", [NO_ADAPTER, 0, 2])
def test_a_row_does_not_depend_on_adapters_around(
    saved: Saved, place: int, dtype: torch.dtype, quantization: Quantization
) -> None:
    """Bit by bit: of one that wants none also what the program without adapters says."""
    bench = AdaptedBench(saved("llama")[0], dtype, quantization=quantization)
    if isinstance(bench.backend, Reference):
        pytest.skip("holds for compiled kernels alone")
    tokens, other = prompt_of(90), prompt_of(70, 1)
    table, beside = bench.blocks(90), [bench.blocks(70) for _ in range(3)]
    before = bench.step((tokens, 0, table, NO_ADAPTER))[0]
    bench.adapt()
    alone = bench.step((tokens, 0, table, place))[0]
    written = bench.pool[list(table)].clone()
    assert torch.equal(alone, before) == (place == NO_ADAPTER)
    for company in ([2], [0, NO_ADAPTER, 2], [NO_ADAPTER, 0]):
        bench.pool.fill_(torch.nan)
        rest = [(other[: 33 + i], 0, beside[i], p) for i, p in enumerate(company)]
        bench.step(*rest[:1], (tokens[:37], 0, table, place), *rest[1:])
        last = bench.step((tokens[37:], 37, table, place), *rest)[0]
        assert torch.equal(last, alone)
        assert torch.equal(bench.pool[list(table)].nan_to_num(9), written.nan_to_num(9))


def test_over_int8_weights_it_adds_the_same(saved: Saved, tmp_path: Path) -> None:
    """What an adapter changes in the logits is what it changes over plain weights, roughly."""
    changes = []
    for quantization in ("none", "int8"):
        bench = AdaptedBench(saved("llama")[0], torch.float32, quantization=quantization)
        table = bench.blocks(30)
        plain = bench.step((prompt_of(30), 0, table, NO_ADAPTER))[0]
        bench.adapt()
        changes.append(bench.step((prompt_of(30), 0, table, 0))[0] - plain)
    assert (changes[0] - changes[1]).norm() < 0.2 * changes[0].norm()


# --- Coming and going -----------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.5], ids=["left on the device", "waited for"])
def test_an_adapter_that_is_not_there_ends_its_rows_alone(
    saved: Saved, tmp_path: Path, penalty: float
) -> None:
    folder, model = saved("llama")
    runner = runner_for(folder)
    save_adapter(tmp_path, model)
    adapter, prompt = load(runner, "a", tmp_path), prompt_of(40)
    runner.adapters.drop(adapter, runner.adapters.leave(adapter))
    wishes = {"gone": Wish(prompt, adapter), "silent": Wish(prompt, "b@0"), "well": Wish(prompt)}
    rows = (
        Row("gone", 1, prompt, 0, (0, 1, 2), True),
        Row("silent", 1, prompt[:16], 0, (3, 4, 5), False),
        Row("well", 1, prompt, 0, (6, 7, 8), True),
    )
    sampling = greedy(presence_penalty=penalty)
    known = [(name, 1, w.prompt, len(w.prompt), sampling, w.adapter) for name, w in wishes.items()]
    plan = BatchPlan(0, rows, tuple(Admission(*each) for each in known))
    gone, well, silent = runner.run(plan)
    assert well == RowOutput("well", 1, expected(model, prompt, 1))
    for output, name in ((gone, adapter), (silent, "b@0")):
        assert not output.tokens and output.problem is not None
        assert output.problem.code is ErrorCode.MODEL_NOT_FOUND and name in output.problem.message
    assert load(runner, "a", tmp_path) == adapter  # and it can come back


def a_tensor_of(adapted: Any) -> Tensor:
    """Of one matrix, packed for compiled kernels or as it is."""
    tensor: Tensor = adapted.kept[0] if hasattr(adapted, "kept") else adapted.down
    return tensor


def test_memory_comes_back(saved: Saved, tmp_path: Path) -> None:
    folder, model = saved("llama")
    runner = runner_for(folder)
    for index in range(3):
        save_adapter(tmp_path / str(index), model, index)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    kept = load(runner, "kept", tmp_path / "0")
    before, bytes_before = tensors(), runner.adapters.num_bytes
    seen = []
    for name in ("1", "2"):
        adapter = load(runner, name, tmp_path / name)
        held = runner.adapters._held[adapter]
        seen.append(weakref.ref(a_tensor_of(held.packed.matrices[0])))  # type: ignore[attr-defined]
        assert runner.adapters.num_bytes > bytes_before
        del held
        runner.adapters.drop(adapter, runner.adapters.leave(adapter))
    assert runner.adapters.num_bytes == bytes_before and tensors() == before
    assert [ref() for ref in seen] == [None, None]
    assert runner.adapters.has(kept)


def test_an_id_says_what_is_added(saved: Saved, tmp_path: Path) -> None:
    """Equal in equal adapters wherever they lie, another if one number or one scale is another."""
    folder, model = saved("llama")
    runner = runner_for(folder)
    save_adapter(tmp_path / "a", model)
    save_adapter(tmp_path / "same", model)
    save_adapter(tmp_path / "scaled", model, lora_alpha=13)
    save_adapter(tmp_path / "other", model, 2)
    ids = [load(runner, "n", tmp_path / name) for name in ("a", "same", "scaled", "other")]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    name, _, version = ids[0].partition("@")
    assert name == "n" and len(version) == 16 and int(version, 16)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert load(runner, "n", tmp_path / "a") not in ids


def test_limits_are_said(saved: Saved, tmp_path: Path) -> None:
    folder, model = saved("llama")
    for index in range(3):
        save_adapter(tmp_path / str(index), model, index)
    runner = runner_for(folder, LoraLimits(loras=2))
    first = load(runner, "a", tmp_path / "0")
    load(runner, "b", tmp_path / "1")
    assert "2 LoRA adapters are loaded, which is --max-loras" in refusal(runner, tmp_path / "2")
    load(runner, "a", tmp_path / "0")  # it is there already
    runner.adapters.drop(first, runner.adapters.leave(first))
    load(runner, "c", tmp_path / "2")
    assert "rank 8; --max-lora-rank is 4" in refusal(
        runner_for(folder, LoraLimits(rank=4)), tmp_path / "0"
    )
    line = refusal(runner_for(folder, LoraLimits(num_bytes=4096)), tmp_path / "0")
    assert "--lora-bytes 4KiB 4KiB are left; unload another one, or raise it" in line
    assert "--max-loras" in refusal(runner_for(folder, LoraLimits(loras=0)), tmp_path / "0")
    assert "1 to 100 characters, not 101" in refusal(runner, tmp_path / "0", "n" * 101)


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(saved: Saved) -> Runner:
    return runner_for(saved("llama")[0])


@pytest.fixture
def adapter(saved: Saved, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "a", saved("llama")[1])
    return tmp_path / "a"


def config_with(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def tensors_with(folder: Path, **changes: Callable[[Tensor], Tensor | None]) -> None:
    """By the end of a name: what becomes of it."""
    tensors = load_file(folder / WEIGHTS)
    for name in list(tensors):
        for end, change in changes.items():
            if name.endswith(end.replace("__", ".") + ".weight"):
                made = change(tensors.pop(name))
                if made is not None:
                    tensors[name] = made.contiguous()
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "asks for DoRA, which is not supported; merge it into the model"),
        ({"bias": "all"}, "asks for biases (bias: all), which is not supported; merge"),
        ({"modules_to_save": ["lm_head"]}, "(modules_to_save), which is not supported; merge"),
        ({"new_trick": {"x": 1}}, "new_trick is not known, and may change what is added"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA is supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the model's own weights; save the"),
        ({"r": 0}, "a rank of 0; it is 1 at least"),
        ({"r": 4}, "lora_A.weight has shape [8, 96], model and config say [4, 96]"),
        ({"r": "8"}, "Expected `int`, got `str` - at `$.r`"),
        ({"lora_alpha": 1e999}, "JSON is malformed"),
        ({"rank_pattern": {"(a+)+": 8}}, "pattern '(a+)+' may take very long to search for"),
        ({"rank_pattern": {".?" * 3 + "Z": 8}}, "may take very long to search for"),
        ({"rank_pattern": {str(n): 8 for n in range(65)}}, "65 patterns; at most 64 are read"),
        ({"alpha_pattern": {"[": 8}}, "pattern '[': unterminated character set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_ask_for_more_are_refused(
    runner: Runner, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    config_with(adapter, **changes)
    line = refusal(runner, adapter)
    assert words in line and str(adapter) in line


def test_modules_that_are_named_and_not_there_are_missed(
    runner: Runner, saved: Saved, tmp_path: Path
) -> None:
    save_adapter(tmp_path, saved("llama")[1], target_modules=["q_proj", "v_proj"])
    config_with(tmp_path, target_modules=["q_proj", "v_proj", "up_proj", "c_attn"])
    assert "no tensors of up_proj, which target_modules name" in refusal(runner, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_proj.lora_A": lambda x: x[:, :32]}, "shape [8, 32], model and config say [8, 64]"),
        ({"q_proj.lora_B": lambda x: None}, "q_proj has half an adapter: lora_A alone"),
        ({"k_proj.lora_A": lambda x: None}, "k_proj has half an adapter: lora_B alone"),
        ({"v_proj.lora_B": lambda x: x * torch.nan}, "lora_B.weight has numbers that are none"),
        ({"v_proj.lora_B": lambda x: x.long()}, "is torch.int64, which is not supported"),
        ({"": lambda x: None}, "has no tensors"),
    ],
    ids=["shape", "half", "other half", "nan", "dtype", "empty"],
)
def test_broken_tensors_are_refused(
    runner: Runner, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    tensors_with(adapter, **changes)
    assert words in refusal(runner, adapter)


def test_what_was_made_for_another_model_is_refused(
    saved: Saved, runner: Runner, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "wide", saved("llama_one_kv_head")[1])
    config_with(tmp_path / "wide", base_model_name_or_path="some/other")
    line = refusal(runner, tmp_path / "wide")
    assert "model and config say" in line and "it was made for some/other" in line
    tiny_model(tiny_config("phi3")).save_pretrained(tmp_path / "phi3")
    phi3 = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3")
    save_adapter(tmp_path / "phi", phi3, target_modules=["qkv_proj"])
    assert f"adds to {LAYER}.self_attn.qkv_proj; here adapters add to down_proj, gate_proj" in (
        refusal(runner, tmp_path / "phi")
    )
    save_adapter(tmp_path / "head", saved("llama")[1], target_modules=["lm_head", "q_proj"])
    assert "lm_head.base_layer.weight is not supported" in refusal(runner, tmp_path / "head")
    tensors_with(tmp_path / "head", **{"base_layer": lambda x: None})
    assert "adds to lm_head; here adapters add to" in refusal(runner, tmp_path / "head")
    save_adapter(tmp_path / "embedding", saved("llama")[1], target_modules=["embed_tokens"])
    assert "embed_tokens.base_layer.weight is not supported" in (
        refusal(runner, tmp_path / "embedding")
    )
    moe = runner_for(saved("mixtral")[0])
    line = refusal(moe, tmp_path / "head")
    assert "add to k_proj, o_proj, q_proj, v_proj" in line


def test_paths_are_checked(runner: Runner, saved: Saved, adapter: Path, tmp_path: Path) -> None:
    assert "No such file or directory; give the folder" in refusal(runner, tmp_path / "none")
    assert "needs an absolute path, or give --lora-dir" in refusal(runner, "a")
    assert "is no folder; give the one that adapter_config.json is in" in (
        refusal(runner, adapter / CONFIG)
    )
    inside = runner_for(saved("llama")[0], LoraLimits(folder=str(tmp_path)))
    load(inside, "a", Path("a"))
    load(inside, "b", adapter)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    adapter.rename(outside)
    for way in (outside, f"../{outside.name}"):
        assert "lies outside of --lora-dir" in refusal(inside, way)
    (tmp_path / "link").symlink_to(outside)
    assert "lies outside of --lora-dir" in refusal(inside, "link")
    load(runner, "linked", tmp_path / "link")
    adapter.mkdir()
    for name in (CONFIG, WEIGHTS):
        (adapter / name).symlink_to(outside / name)
    load(runner, "files", adapter)  # as the hub's cache has them
    assert f"{WEIGHTS}: lies outside" in refusal(inside, adapter) or CONFIG in refusal(
        inside, adapter
    )


def test_files_are_checked(runner: Runner, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / PICKLE)
    assert "is a pickle, which is never read; save the adapter as" in refusal(runner, adapter)
    (adapter / PICKLE).rename(adapter / WEIGHTS)
    with (adapter / WEIGHTS).open("r+b") as file:
        file.truncate(2000)
    assert WEIGHTS in refusal(runner, adapter)
    (adapter / CONFIG).write_text(" " * (1 << 20) + "{}")
    assert "is larger than 1MiB" in refusal(runner, adapter)
    (adapter / CONFIG).write_text("{")
    assert CONFIG in refusal(runner, adapter)
    (adapter / CONFIG).unlink()
    assert "No such file" in refusal(runner, adapter)


def test_half_precision_is_read(saved: Saved, adapter: Path) -> None:
    """In the model's dtype, whatever the file's."""
    tensors_with(adapter, **{"": lambda x: x.half()})
    modules = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(3)}
    config_with(adapter, target_modules=["q_proj"])
    tensors = {k: v for k, v in load_file(adapter / WEIGHTS).items() if "q_proj" in k}
    save_file(tensors, adapter / WEIGHTS)
    for dtype in (torch.float32, torch.bfloat16):
        lora = read_lora(str(adapter), modules, dtype, LoraLimits(), 1 << 20)
        name = f"base_model.model.{LAYER}.self_attn.q_proj.lora_A.weight"
        low = lora.modules[f"{LAYER}.self_attn.q_proj"]
        assert low.down.dtype == dtype and torch.equal(low.down, tensors[name].to(dtype))
        assert low.scale == 12 / 8 and lora.rank == 8
