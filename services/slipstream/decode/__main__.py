"""`slipstream decode`: a worker with the weights of its role."""

from slipstream.decode.config import DecodeConfig
from slipstream.engine.service import run_worker


def run(config: DecodeConfig) -> int:
    return run_worker(config)
