"""Every architecture that Transformers has for causal language models, tiny and random: which of
them answer over our KV blocks as Transformers does, and why each other one is refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slipstream.core.machine import Row
from slipstream.engine.attention_interface import RefusedError
from slipstream.engine.batch import Inputs, build_batch
from slipstream.engine.model_config import ForeignModel, Reach
from slipstream.engine.runner import allocate_pool
from slipstream.engine.transformers_model import TransformersModel, describe, prove

ARCHITECTURES: Mapping[str, str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
"""Model type, as in config.json -> class."""
TOLERANCE = 1e-4
"""Of a token's logits, relative to how far they are spread."""
BLOCKS = 24
_CPU = torch.device("cpu")
_SIZES: dict[int, tuple[str, ...]] = {
    199: ("vocab_size", "vocab_size_per_layer_input"),
    64: ("hidden_size", "d_model", "n_embd", "embedding_size", "hidden_dim"),
    4: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "eos_token_id"),
    16: ("head_dim", "kv_channels", "hidden_size_per_layer_input", "q_lora_rank", "kv_lora_rank"),
    8: ("rotary_dim", "qk_rope_head_dim", "floor_scale"),
    96: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "attention_chunk_size"),
        *("qk_nope_head_dim", "v_head_dim"),
    ),
    24: ("sliding_window", "window_size"),
    512: ("max_position_embeddings", "n_positions"),
    1: ("n_group", "topk_group", "bos_token_id"),
    0: ("pad_token_id",),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SPECIAL: dict[str, dict[str, Any]] = {
    # What the sizes above do not fit, or what a default leaves out that checkpoints have.
    "cohere_compass_text": {
        "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL],
        "rope_parameters": {_SLIDING: _ROPE, _FULL: _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING, _FULL],
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "zamba2": {"layer_types": ["mamba", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}
_AS_THEY_ARE = ("musicgen", "musicgen_melody")
"""Refused before anything is built."""
_PARTS = ("vision_config", "audio_config")


class Verdict(NamedTuple):
    reason: str
    """Why it is not served; empty: it passes."""
    reaches: tuple[Reach, ...] = ()
    tried: bool = True
    wrong: bool = False
    """Nobody refused it, and its logits were others."""


def tiny_config(model_type: str) -> Any:
    """Its default config with small sizes; windows and chunks end within a test's prompts."""
    config_class = CONFIG_MAPPING[model_type]
    whole = config_class()
    if model_type in _AS_THEY_ARE:
        return whole
    text = whole.get_text_config(decoder=True)
    sizes = _shrunk(text)
    parts: dict[str, Any] = {
        name: {**_shrunk(part), "model_type": part.model_type}
        for name in _PARTS
        if (part := getattr(whole, name, None)) is not None
    }
    if text is whole:
        return config_class(**sizes, **parts)
    return config_class(text_config={**sizes, "model_type": text.model_type}, **parts)


def _shrunk(config: Any) -> dict[str, Any]:
    given, alias = config.to_dict(), config.attribute_map
    sizes: dict[str, Any] = {}
    for size, names in _SIZES.items():
        for name in names:
            own = alias.get(name, name)
            if isinstance(given.get(own), int):
                sizes[own] = size
    if "kv_lora_rank" in sizes:
        sizes.pop("head_dim", None)
    return {**sizes, **_SPECIAL.get(config.model_type, {})}


def tiny_model(config: Any) -> Any:
    """In float32, attending as Transformers does."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # The initial weights are too alike: biases of 0, norms of 1 and flat logits hide mistakes.
        for name, parameter in model.named_parameters():
            parameter.normal_(*((1.0, 0.2) if "norm" in name else (0.0, 0.15)))
    return model.float()


def judge(model_type: str) -> Verdict:
    """What a worker would say to a checkpoint of this architecture."""
    try:
        config = tiny_config(model_type)
    except (ValueError, StrictDataclassError):
        return Verdict("the parts of a small config contradict each other", tried=False)
    try:
        facts = ForeignModel(
            **describe(config), eos_token_ids=frozenset(), dtype="float32", fingerprint=""
        )
        model = tiny_model(config)
        prove(model, facts)
    except RefusedError as error:
        return Verdict(str(error))
    error = largest_error(model, facts)
    if not error < TOLERANCE:
        return Verdict(f"its logits are off by {error:.1g}", wrong=True)
    return Verdict("", facts.reaches)


def largest_error(model: Any, facts: ForeignModel) -> float:
    """Over all tokens of `scenario`, relative to the spread of the logits."""
    bench = Bench(model, facts)
    errors = [0.0]
    for tokens, start, ours in scenario(bench):
        theirs = bench.expected(tokens)[start : start + len(ours)]
        spread = (theirs - theirs.mean(1, keepdim=True)).norm(dim=1)
        errors.append(float(((ours - theirs).norm(dim=1) / spread).max()))
    return max(errors, key=lambda error: (error != error, error))


Said = tuple[tuple[int, ...], int, Tensor]
"""A request's tokens, the first position of a step, its logits from there on."""


def scenario(bench: "Bench") -> Iterator[Said]:
    """A prompt in chunks, one that uses its blocks, one at once, and answers token by token, in
    mixed steps; then the blocks lie in another pool, under other numbers, and all goes on."""
    a, c = bench.draw(84), bench.draw(40)
    b = a[:48] + bench.draw(22)
    tables = {a: (17, 3, 9, 11, 0, 20), c: (5, 14, 1)}
    tables[b] = (*tables[a][:3], 8, 2)
    done = {a: 0, b: 48, c: 0}
    steps: list[dict[tuple[int, ...], int]] = [
        {a: 50},
        {c: 33, a: 1},
        {a: 25, b: 17, c: 1},
        {b: 1, a: 1, c: 1},
        {},
        {a: 1, b: 1, c: 1},
        {a: 5, b: 3, c: 4},
    ]
    for step in steps:
        if not step:
            moved = bench.move(sorted({block for table in tables.values() for block in table}))
            tables = {each: tuple(moved[block] for block in t) for each, t in tables.items()}
            continue
        rows = [
            (each[done[each] :][:count], done[each], tables[each]) for each, count in step.items()
        ]
        for each, logits in zip(step, bench.run(rows), strict=True):
            yield each, done[each], logits
            done[each] += step[each]


class Bench:
    """A model with a pool full of NaN: what nobody wrote must not matter."""

    def __init__(self, model: Any, facts: ForeignModel) -> None:
        self._model, self._vocab = model, facts.vocab_size
        self._ours = TransformersModel(model, facts)
        self._layout = facts.kv_layout("float32")
        self.pool = self._empty()
        self._generator = torch.Generator().manual_seed(1)
        self._expected: dict[tuple[int, ...], Tensor] = {}

    def _empty(self) -> Tensor:
        return allocate_pool(self._layout, BLOCKS).fill_(torch.nan)

    def draw(self, count: int) -> tuple[int, ...]:
        return tuple(
            torch.randint(3, min(self._vocab, 190), (count,), generator=self._generator).tolist()
        )

    def move(self, blocks: Sequence[int]) -> dict[int, int]:
        moved = {block: (block * 5 + 7) % BLOCKS for block in blocks}
        pool = self._empty()
        pool[list(moved.values())] = self.pool[list(moved)]
        self.pool = pool
        return moved

    def run(
        self, parts: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]]
    ) -> Sequence[Tensor]:
        """One step of (tokens, start, block table): logits of all tokens of each."""
        rows = [
            Row(f"r{index}", 1, tokens, start, table, True, prompt_logprobs=len(tokens) - 1)
            for index, (tokens, start, table) in enumerate(parts)
        ]
        batch = build_batch(rows, [Inputs(row.tokens, row.start) for row in rows], _CPU)
        with torch.inference_mode():
            logits = self._ours.forward(batch, self.pool)
        return logits.split([len(row.tokens) for row in rows])

    def expected(self, tokens: tuple[int, ...]) -> Tensor:
        """Transformers' own logits, of one pass over all tokens."""
        if tokens not in self._expected:
            self._model.set_attn_implementation("eager")
            with torch.inference_mode():
                out = self._model(input_ids=torch.tensor([tokens]), use_cache=False)
            self._expected[tokens] = out.logits[0].float()
            self._model.set_attn_implementation("slipstream")
        return self._expected[tokens]
