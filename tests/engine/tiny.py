"""Tiny random models of every family, saved as Transformers saves them, and means to run them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.engine.batch import Inputs, build_batch
from slipstream.engine.decoder import Decoder
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner, allocate_pool, choose_backend
from slipstream.engine.weights import load_weights
from slipstream.types import BLOCK_TOKENS, SamplingParams
from tokenizer.models import byte_level

VOCAB = 199
_CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": (
        "llama",
        {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 112},
    ),
    "llama_head_dim_24": ("llama", {"head_dim": 24, "hidden_size": 60, "num_attention_heads": 6}),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "llama_llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_yarn": ("llama", {"rope_parameters": _YARN}),
    "llama_yarn_factors": (
        "llama",
        {
            "rope_parameters": {
                **_YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            }
        },
    ),
    "llama_yarn_attention_factor": (
        "llama",
        {"rope_parameters": {**_YARN, "attention_factor": 1.7}},
    ),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral_idle_window": ("mistral", {"sliding_window": 512}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_even": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen2_moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}
WORDS = "llama_words"
"""The case that has a tokenizer; more logits than tokens."""
WORDS_VOCAB = 501
CASES[WORDS] = ("llama", {"vocab_size": WORDS_VOCAB})


def save_model(folder: Path, case: str, **changes: Any) -> PreTrainedModel:
    """Writes the case's model to `folder` in float32, and returns it."""
    kind, settings = CASES[case]
    config_class, model_class = _CLASSES[kind]
    torch.manual_seed(sum(case.encode()))
    config = config_class(**{**_COMMON, **settings, **changes})
    config._attn_implementation = "eager"
    model: PreTrainedModel = model_class(config).eval()
    with torch.no_grad():
        # The initial weights are too alike: biases of 0, norms of 1 and flat logits hide mistakes.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder, max_shard_size=changes.get("max_shard_size", "5GB"))
    if case == WORDS:
        byte_level(folder)
    return model


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def scrambled_blocks(num_tokens: int, taken: set[int], num_blocks: int) -> tuple[int, ...]:
    """Blocks in no order at all, none of them `taken` (they are now)."""
    generator = torch.Generator().manual_seed(len(taken))
    order = torch.randperm(num_blocks, generator=generator).tolist()
    free = [block for block in order if block not in taken]
    blocks = tuple(free[: -(-num_tokens // BLOCK_TOKENS)])
    taken.update(blocks)
    return blocks


class Bench:
    """A decoder with a pool full of NaN: what nobody wrote must not matter."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        blocks: int = 64,
        int8: bool = False,
    ) -> None:
        self.config = ModelConfig.read(folder)
        device = torch.device("cpu")
        self.backend = choose_backend(self.config, dtype, device, int8)
        weights = load_weights(folder, self.config, dtype, device, self.backend)
        self.decoder = Decoder(self.config, weights, self.backend)
        name: Any = str(dtype).removeprefix("torch.")
        self.pool = allocate_pool(self.config.kv_layout(name), blocks).fill_(torch.nan)
        self.taken: set[int] = set()

    def blocks(self, num_tokens: int) -> tuple[int, ...]:
        return scrambled_blocks(num_tokens, self.taken, self.pool.shape[0])

    def logits(self, *parts: tuple[Sequence[int], int, tuple[int, ...]]) -> Tensor:
        """One step of (input tokens, start, block table) rows: logits of each row's last token."""
        rows = [
            Row(f"r{index}", 1, tuple(tokens), start, table, True)
            for index, (tokens, start, table) in enumerate(parts)
        ]
        batch = build_batch(
            rows, [Inputs(row.tokens, row.start) for row in rows], torch.device("cpu")
        )
        with torch.inference_mode():
            return self.decoder.forward(batch, self.pool).clone()


def greedy(max_tokens: int = 1000, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, **changes)


def admission(
    request_id: str, tokens: tuple[int, ...], sampling: SamplingParams, num_prompt: int = 0
) -> Admission:
    return Admission(request_id, 1, tokens, num_prompt or len(tokens), sampling)


def generate(
    runner: Runner,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    count: int,
    *,
    request_id: str = "a",
    accepted: tuple[int, ...] = (),
    blocks: tuple[int, ...] = tuple(range(40)),
) -> tuple[int, ...]:
    """`count` tokens of one request alone, each step fed by the sample before."""
    tokens = prompt + accepted
    made: list[int] = []
    for step in range(count):
        position = len(accepted) + step
        inputs, start = (tokens, 0) if step == 0 else ((), len(tokens) + step - 1)
        row = Row(request_id, 1, inputs, start, blocks, True, position, step > 0)
        admitted = (admission(request_id, tokens, sampling, len(prompt)),) if step == 0 else ()
        (output,) = runner.run(BatchPlan(step, (row,), admitted))
        made += output.tokens
    runner.run(BatchPlan(count, (), dropped=((request_id, 1),)))
    return tuple(made)
