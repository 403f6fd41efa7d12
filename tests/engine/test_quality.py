"""int8 weights predict a text nearly as well as those that they were made of."""

import pytest

from slipstream.kernels import cpu
from slipstream.loadtest import quality


def test_the_demo_model_keeps_its_quality() -> None:
    if cpu.kernels() is None:
        pytest.skip("takes minutes without compiled kernels")
    folder = quality.prepared("demo")
    tokens = quality.encode(folder, quality.TEXT.read_text(encoding="utf-8"))
    assert len(tokens) > 1800
    measured = quality.measure(folder, "bfloat16", tokens)
    assert 2 < measured.plain.perplexity < 20  # the text makes sense to the model
    assert measured.perplexity_ratio <= quality.PERPLEXITY_RATIO_MAX
    assert measured.agreement >= quality.AGREEMENT_MIN
