"""A disaggregated LLM inference server. `from slipstream import LLM, SamplingParams` runs its
engine in this process; everything else is in the modules."""

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.offline.llm import LLM as LLM
    from slipstream.offline.outputs import RequestOutput as RequestOutput
    from slipstream.offline.params import LoRARequest as LoRARequest
    from slipstream.offline.params import SamplingParams as SamplingParams

__path__ = pkgutil.extend_path(__path__, __name__)  # in a checkout parts of it lie elsewhere

_WHERE = {
    "LLM": "slipstream.offline.llm",
    "LoRARequest": "slipstream.offline.params",
    "RequestOutput": "slipstream.offline.outputs",
    "SamplingParams": "slipstream.offline.params",
}


def __getattr__(name: str) -> Any:
    """At its first use: services of the control plane never import torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
