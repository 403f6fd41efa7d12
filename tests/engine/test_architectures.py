"""Every causal language model of Transformers, over our KV blocks: docs/models.md is true."""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from engine.architectures import (
    ARCHITECTURES,
    TOLERANCE,
    judge,
    largest_error,
    tiny_config,
    tiny_model,
)
from engine.models_page import row
from slipstream.engine.attention_interface import Paged, Reach, RefusedError
from slipstream.engine.model_config import ForeignModel
from slipstream.engine.transformers_model import describe, prove

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROMISED = ("gemma2", "gemma3_text", "phi3", "granite", "olmo2", "gpt_oss", "mixtral", "qwen3_moe")
LEAST = 60


@pytest.fixture(scope="module")
def lines() -> set[str]:
    return set(PAGE.read_text(encoding="utf-8").splitlines(keepends=True))


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    """With one thread: a team would wait for itself at each of many small operations."""
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_page_says_what_comes_out(model_type: str, lines: set[str]) -> None:
    verdict = judge(model_type)
    assert not verdict.wrong, verdict.reason
    assert row(model_type, verdict) in lines, "run `make docs`"


def test_enough_of_them_pass(lines: set[str]) -> None:
    passing = {line.split(" | ")[0].strip("| ") for line in lines if "**passes**" in line}
    assert len(passing) >= LEAST and set(PROMISED) <= passing
    assert f"{len(passing)} of {len(ARCHITECTURES)} pass.\n" in lines
    assert any(f"Transformers {transformers.__version__} " in line for line in lines)


def facts_of(config: object) -> ForeignModel:
    described = describe(config)
    return ForeignModel(**described, eos_token_ids=frozenset(), dtype="float32", fingerprint="")


@pytest.mark.parametrize(
    ("model_type", "field"), [("gemma2", "softcap"), ("gpt_oss", "sinks"), ("gemma", "scale")]
)
def test_what_shapes_scores_matters(
    model_type: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, it shows: the comparison would find it."""
    config = tiny_config(model_type)
    facts, model = facts_of(config), tiny_model(config)
    attend = Paged.attend
    nothing = {"softcap": 0.0, "sinks": None, "scale": 0.3}[field]
    monkeypatch.setattr(
        Paged,
        "attend",
        lambda *given: attend(*given[:-1], given[-1]._replace(**{field: nothing})),
    )
    with pytest.raises(RefusedError, match="come out differently"):
        prove(model, facts)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "olmo3"])
def test_windows_matter(model_type: str) -> None:
    config = tiny_config(model_type)
    facts, model = facts_of(config), tiny_model(config)
    assert {reach.window for reach in facts.reaches} == {0, 24}
    assert largest_error(model, facts) < TOLERANCE
    blind = msgspec.structs.replace(facts, reaches=(Reach(),) * facts.num_layers)
    assert largest_error(model, blind) > 100 * TOLERANCE


def test_a_state_beside_keys_and_values_is_found() -> None:
    """A model that looks like any other to the probe, with a layer that remembers a token."""
    config = tiny_config("llama")
    facts, model = facts_of(config), tiny_model(config)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + x.roll(1, dims=1))
    with pytest.raises(RefusedError, match=r"\d+ of 17 tokens come out differently"):
        prove(model, facts)


def test_a_context_ends_where_angles_would_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    sizes = tiny_config("phi3").to_dict()
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 128}
    facts = facts_of(CONFIG_MAPPING["phi3"](**{**sizes, **changes}))
    assert facts.max_position_embeddings == 128


def test_every_reason_is_one_plain_line() -> None:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if "refused: " in line:
            assert not re.search(r"Traceback|0x[0-9a-f]{6}|site-packages", line) and len(line) < 220
