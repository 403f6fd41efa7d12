"""Inverse frequencies and attention factor, bit by bit those of Transformers."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.engine.families import RawConfig
from slipstream.engine.model_config import RopeConfig
from slipstream.engine.rope import ROPE_TYPES, Rope


def draw(rope_type: str, seed: int) -> dict[str, Any]:
    choice = random.Random(seed)
    settings: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": choice.choice([1e4, 1e5, 5e5, 1e6]),
        "factor": choice.choice([1.0, 2.0, 8.0, 32.0]),
    }
    if rope_type != "linear":
        settings["original_max_position_embeddings"] = choice.choice([64, 4096, 8192])
    if rope_type == "llama3":
        settings["low_freq_factor"] = choice.choice([1.0, 1.5])
        settings["high_freq_factor"] = choice.choice([2.0, 4.0])
    if rope_type == "yarn":
        fast = choice.choice([4.0, 32.0])
        optional = {
            "beta_fast": fast,
            "beta_slow": choice.choice([1.0, 2.0, fast]),  # equal: the ramp is a step
            "truncate": choice.choice([True, False]),
            "attention_factor": choice.choice([0.5, 1.3]),
            "mscale": choice.choice([0.7, 1.0]),
            "mscale_all_dim": choice.choice([0.5, 1.0]),
        }
        settings |= {key: value for key, value in optional.items() if choice.random() < 0.6}
    return settings


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_frequencies_equal_transformers(rope_type: str) -> None:
    for seed in range(60):
        settings = draw(rope_type, seed)
        head_dim = random.Random(seed).choice([16, 64, 96, 128])
        config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(settings))
        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
        theta = settings.pop("rope_theta")
        rope = RopeConfig(theta=theta, **settings)
        actual, factor = ROPE_TYPES[rope_type](rope, head_dim)
        assert torch.equal(actual, wanted), (seed, settings)
        assert factor == wanted_factor, (seed, settings)


def test_angles_far_into_a_long_context() -> None:
    rope = Rope(RopeConfig(rope_type="default", theta=1e6), 64, torch.device("cpu"))
    positions = torch.tensor([0, 1, 131_071])
    cosine, sine = rope.angles(positions)
    frequencies = 1.0 / (1e6 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))
    angles = positions[:, None].float() * frequencies
    assert torch.equal(cosine, angles.cos()) and torch.equal(sine, angles.sin())
    assert cosine[0].tolist() == [1.0] * 32


def test_every_rope_type_can_be_configured() -> None:
    from slipstream.engine.model_config import _ROPE_NEEDS

    assert _ROPE_NEEDS.keys() == ROPE_TYPES.keys()
    assert "rope_parameters" in RawConfig.__struct_fields__
