"""Random LoRA adapters for the tiny models, saved by PEFT itself."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: PreTrainedModel, seed: int = 1, **settings: Any) -> Any:
    """PEFT's model, over a copy: its adapter says something else than the model does."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 8, "lora_alpha": 12, "target_modules": ALL, **settings}
    made = get_peft_model(copy.deepcopy(model), LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (0.3 if "lora_A" in name else 0.15))
    return made


def save_adapter(folder: Path, model: PreTrainedModel, seed: int = 1, **settings: Any) -> Any:
    """Also what PEFT computes with."""
    made = adapted(model, seed, **settings)
    made.save_pretrained(str(folder))
    return made


def expected(model: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Greedy tokens of `generate`."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(made[0, len(prompt) :].tolist())
