"""What `LLM` is given: settings of `slipstream decode`, and what vLLM calls its own."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from slipstream.config import ConfigError, WorkerConfig, flag_of, load, resolve
from slipstream.decode.config import DecodeConfig

OURS = {
    "gpu_memory_utilization": "gpu_memory_share",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "max_num_batched_tokens": "prefill_budget_tokens",
}
"""vLLM's name -> ours."""
EITHER = (False, True)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_local_media_path": ("",),
    "async_scheduling": EITHER,
    "block_size": (16,),
    "compilation_config": (),
    "config_format": ("auto",),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": EITHER,
    "disable_log_stats": EITHER,
    "distributed_executor_backend": (),
    "enable_chunked_prefill": (True,),
    "enable_expert_parallel": (False,),
    "enable_sleep_mode": (False,),
    "enforce_eager": EITHER,
    "generation_config": ("auto",),
    "hf_overrides": ({},),
    "hf_token": (),
    "kv_transfer_config": (),
    "limit_mm_per_prompt": ({},),
    "logprobs_mode": ("raw_logprobs",),
    "pipeline_parallel_size": (1,),
    "revision": (),
    "runner": ("auto", "generate"),
    "skip_tokenizer_init": (False,),
    "speculative_config": (),
    "swap_space": (0, 4),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (),
    "trust_remote_code": (False,),
}
"""vLLM's settings that have no like here -> values, beside None, that change no answer."""
_NONE = ("config", "help", "model")
"""Of a command."""
_INSTEAD = {
    "revision": "give a folder that holds it",
    "speculative_config": "speculative='ngram:4' is what there is",
    "tokenizer": "the model's own is used",
}


def worker_config(
    model: str, folder: str, settings: Mapping[str, Any], environ: Mapping[str, str]
) -> WorkerConfig:
    """`model`: as the caller calls it. ConfigError: a setting that is not there, or out of range,
    with the words of the command."""
    served = dict(_served(settings, {**NEUTRAL, "tokenizer": (model, folder)}))
    words = [_word(name, value) for name, value in served.items()]
    given = [f"--model={folder}", f"--threads={len(os.sched_getaffinity(0))}", *words]
    return resolve(load(DecodeConfig, "decode", given, {}), environ)


def _served(
    settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    if settings.get("enable_lora") is False:  # vLLM's default; ours is that there may be some
        yield "max_loras", 0
    for name, value in settings.items():
        if name in _NONE or (value is not None and settings.get(OURS.get(name, "")) is not None):
            why = f"is {OURS[name]} by another name" if name in OURS else "is no setting of it"
            raise ConfigError(f"LLM: {name} {why}; leave it out")
        if value is None or name == "enable_lora" or value in neutral.get(name, ()):
            continue
        if name in neutral:
            instead = _INSTEAD.get(name, "leave it out")
            raise ConfigError(f"LLM: {name}={value!r:.40} is not served; {instead}")
        yield OURS.get(name, name), value


def _word(name: str, value: Any) -> str:
    """As it is typed: `--overlap`, `--no-overlap`, `--max-num-seqs=8`."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    return f"{flag_of(name)}={value}"
