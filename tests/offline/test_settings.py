"""Settings of `LLM`: ours, those of vLLM that mean something here, and those that do not."""

import os
from typing import Any

import pytest

from slipstream.config import ConfigError, WorkerConfig
from slipstream.offline.settings import NEUTRAL, worker_config


def config(**settings: Any) -> WorkerConfig:
    return worker_config("org/tiny", "/models/tiny", settings, {})


@pytest.mark.parametrize("name", ["overlap", "enable_prefix_caching", "log_json"])
@pytest.mark.parametrize("value", [False, True])
def test_a_switch_is_set_either_way(name: str, value: bool) -> None:
    assert getattr(config(**{name: value}), name) is value


def test_none_is_as_if_it_were_not_there() -> None:
    names = ["quantization", "max_model_len", "tokenizer", "kv_cache_bytes", *NEUTRAL]
    assert config(**dict.fromkeys(names)) == config()
    assert config().threads == len(os.sched_getaffinity(0)) and config(threads=2).threads == 2


def test_what_vllm_leaves_as_it_is_may_be_said() -> None:
    for name, values in NEUTRAL.items():
        for value in values:
            assert config(**{name: value}) == config()
    given = {"dtype": "auto", "tensor_parallel_size": 1, "kv_cache_dtype": "auto"}
    assert config(**given, tokenizer="org/tiny", enable_lora=True) == config()


def test_settings_under_the_names_of_vllm() -> None:
    given = config(gpu_memory_utilization=0.5, max_num_batched_tokens=64, enable_lora=True)
    assert (given.gpu_memory_share, given.prefill_budget_tokens, given.max_loras) == (0.5, 64, 16)
    assert config(kv_cache_memory_bytes=2**20).kv_cache_bytes == 2**20
    assert config(enable_lora=False).max_loras == 0
    assert config(enable_lora=True, max_loras=3).max_loras == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"trust_remote_code": True}, "LLM: trust_remote_code=True is not served; leave it out"),
        ({"speculative_config": {"k": 1}}, r"is not served; speculative='ngram:4'"),
        ({"tokenizer": "other"}, "LLM: tokenizer='other' is not served; the model's own is used"),
        ({"cpu_offload_gb": 2}, "LLM: cpu_offload_gb=2 is not served"),
        ({"max_modl_len": 5}, r"max-modl-len.*did you mean --max-model-len"),
        ({"overlapp": False}, r"no-overlapp.*did you mean --no-overlap"),
        ({"help": True}, "LLM: help is no setting of it; leave it out"),
        ({"config": "x.toml"}, "LLM: config is no setting of it"),
        (
            {"max_num_batched_tokens": 64, "prefill_budget_tokens": 32},
            "LLM: max_num_batched_tokens is prefill_budget_tokens by another name",
        ),
        ({"max_num_seqs": -1}, "--max-num-seqs: expected an int >= 1, got -1"),
        ({"dtype": "half"}, "--dtype: expected one of auto, float32, bfloat16"),
    ],
)
def test_what_is_not_served_is_said_in_one_line(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        config(**wrong)
    assert "\n" not in str(raised.value)
