"""Rotary embedding: from its settings to the angles of a step's tokens.

Computed step by step as Transformers' `modeling_rope_utils` does it, in float32 and in the same
order: a frequency that is off by one unit in the last place shows after some thousand positions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.engine.model_config import RopeConfig


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _default(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    return _plain(rope.theta, dim), 1.0


def _linear(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    return _plain(rope.theta, dim) / rope.factor, 1.0


def _llama3(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Long waves are slowed down by `factor`, short ones kept, those between interpolated."""
    inverse = _plain(rope.theta, dim)
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > original / low, inverse / rope.factor, inverse)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, smoothed, scaled), 1.0


def _yarn(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Source: Peng et al., "YaRN: Efficient Context Window Extension", 2023."""

    def dimension_of(rotations: float) -> float:
        waves = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (dim * math.log(waves)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    frequencies = rope.theta ** (torch.arange(0, dim, 2).to(torch.float32) / dim)
    extrapolated, interpolated = 1.0 / frequencies, 1.0 / (rope.factor * frequencies)
    keep = 1 - ramp
    return interpolated * (1 - keep) + extrapolated * keep, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


ROPE_TYPES: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


class Rope:
    """Angles without a table: computing them costs less than a table of a long context holds."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        inverse, self._factor = ROPE_TYPES[rope.rope_type](rope, head_dim)
        self._inverse_frequencies = inverse.to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 `[tokens, head_dim / 2]`, of int64 positions `[tokens]`."""
        angles = positions[:, None].float() * self._inverse_frequencies
        return angles.cos() * self._factor, angles.sin() * self._factor
