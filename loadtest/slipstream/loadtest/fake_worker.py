"""A decode worker that computes nothing: `python -m slipstream.loadtest.fake_worker`, with flags
of `slipstream decode`. Machine, shell and executor are the real ones; the model is a text that is
said over and over, one token for each row, after `--step-ms`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from slipstream.config import load, resolve
from slipstream.core.machine import BatchPlan, RowOutput
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_settings import WorkerSettings
from slipstream.decode.config import DecodeConfig
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.step_loop import Made
from slipstream.kv.choice import Transports
from slipstream.messages import NodeInfo, TextPrompt, WorkerInfo
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.shell import run_service
from slipstream.tokenizer.codec import TokenizerCodec

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune,
must be in want of a wife. However little known the feelings or views of such a man may be on his
first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding
families, that he is considered as the rightful property of some one or other of their daughters."""
"""Jane Austen, Pride and Prejudice."""
LAYOUT = "fake/none/l1"
NUM_BLOCKS = 1 << 16


class Speaker:
    """Says when it had a request, and when that one's first token was made: a line of two times on
    the host's monotonic clock, in s, for each step that admits any."""

    def __init__(self, tokens: list[int], step_s: float, stamps: Path):
        self._tokens, self._step_s = tokens, step_s
        self._stamps = os.open(stamps, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def waits(self, plan: BatchPlan) -> bool:
        return True

    def launch(self, plan: BatchPlan) -> Made:
        began_s = time.monotonic()
        if self._step_s:
            time.sleep(self._step_s)
        text, length = self._tokens, len(self._tokens)
        outputs = tuple(
            RowOutput(row.request_id, row.attempt, (text[row.position % length],))
            for row in plan.rows
            if row.sample
        )
        if plan.admitted:
            os.write(self._stamps, b"%.7f %.7f\n" % (began_s, time.monotonic()))
        return Made(outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--stamps", type=Path, required=True, help="file for times")
    own, flags = parser.parse_known_args()
    config = resolve(load(DecodeConfig, "decode", flags, {}), {})
    codec = TokenizerCodec(Path(config.model))
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
        worker=WorkerInfo(
            model=config.served_model_name,
            kv_layout_id=LAYOUT,
            num_blocks=NUM_BLOCKS,
            block_bytes=1,
            max_model_len=8192,
            vocab_size=codec.vocab_size,
            max_num_seqs=config.max_num_seqs,
            prefill_budget_tokens=config.prefill_budget_tokens,
            accept_decode=True,
        ),
    )
    machine = WorkerMachine(node, WorkerSettings())
    speaker = Speaker(codec.encode(TextPrompt(text=TEXT)), own.step_ms / 1e3, own.stamps)
    transports = Transports([], LAYOUT, 1, node.host)
    pool = np.zeros((NUM_BLOCKS, 1), np.uint8)  # nobody computes, so nobody writes into it
    executor = WorkerExecutor(speaker, pool, transports, lambda: machine.membership.nodes)
    return run_service(config, node, machine, executor)


if __name__ == "__main__":
    sys.exit(main())
