"""int8 weights predict a text nearly as well as those that they were made of; so do float8 blocks,
and float8 weights but for the likeliest token."""

import pytest

from slipstream.kernels import cpu
from slipstream.kernels.ops import Quantization
from slipstream.kv.layout import KvDtype
from slipstream.loadtest import quality

FLOAT8_AGREEMENT = 0.90
"""Float8 rounds off a share of 2.6 % of each number, of weights and activations, which 135 M
parameters feel: 91.8 % was measured, not the 95 % that is wanted (adr 0031)."""


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "agreement"),
    [
        ("int8", None, quality.AGREEMENT_MIN),
        pytest.param("none", "float8_e4m3fn", quality.AGREEMENT_MIN, marks=pytest.mark.slow),
        pytest.param("fp8", None, FLOAT8_AGREEMENT, marks=pytest.mark.slow),
    ],
)
def test_the_demo_model_keeps_its_quality(
    quantization: Quantization, kv_dtype: KvDtype | None, agreement: float
) -> None:
    if cpu.kernels() is None:
        pytest.skip("takes minutes without compiled kernels")
    folder = quality.prepared("demo")
    tokens = quality.encode(folder, quality.TEXT.read_text(encoding="utf-8"))
    assert len(tokens) > 1800
    measured = quality.measure(folder, "bfloat16", tokens, quantization, kv_dtype)
    assert 2 < measured.plain.perplexity < 20  # the text makes sense to the model
    assert measured.perplexity_ratio <= quality.PERPLEXITY_RATIO_MAX
    assert measured.agreement >= agreement
