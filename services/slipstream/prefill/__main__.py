"""`slipstream prefill`: a worker with the weights of its role."""

from slipstream.engine.service import run_worker
from slipstream.prefill.config import PrefillConfig


def run(config: PrefillConfig) -> int:
    return run_worker(config)
