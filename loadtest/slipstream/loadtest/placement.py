"""How long the scheduler takes to place one request: `python -m slipstream.loadtest.placement`.

Target P10: at most 250 µs in the median with 64 workers, hashes and hints given. `machine` is one
call of the scheduler's machine, from the index's answer to the messages for the workers, with the
account and the decision's record; `place` is the choice alone.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import msgspec

from slipstream.core.machine import Event, Received, Started, TimerFired
from slipstream.core.prefix import HASH_BYTES
from slipstream.messages import (
    SCHEDULER,
    FirstToken,
    Hello,
    Located,
    NodeInfo,
    StepSample,
    StreamEnded,
    Submit,
    TokenizerInfo,
    TransferSample,
    WorkerInfo,
    WorkerLoad,
)
from slipstream.scheduler.demand import Placement
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.scheduler.policy import place
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.types import NodeId, Role, SamplingParams

TOKENIZER, INDEX, MODEL = "tokenizer-0", "kvindex-0", "m"
PROMPT_TOKENS = 8000
HASHES = random.Random(1).randbytes(PROMPT_TOKENS // 16 * HASH_BYTES)


class Cluster:
    """A scheduler in the middle of its work: prompts wait, streams run, prices are fitted."""

    def __init__(self, workers: int, policy: str, disaggregation: str, draw: random.Random):
        node = NodeInfo(node_id=SCHEDULER, role=Role.SCHEDULER, epoch=1, address="s")
        settings = SchedulerSettings(
            policy=policy,  # type: ignore[arg-type]
            disaggregation=disaggregation,  # type: ignore[arg-type]
            max_requests=100_000,
        )
        self.machine, self.draw = SchedulerMachine(node, settings), draw
        self.workers = [_worker(number) for number in range(workers)]
        self.give(Started())
        tokenizer = _node(TOKENIZER, Role.TOKENIZER)
        tokenizer = msgspec.structs.replace(tokenizer, tokenizer=TokenizerInfo(model=MODEL))
        for other in (tokenizer, _node(INDEX, Role.KVINDEX), *self.workers):
            self.give(Received(other.node_id, Hello(node=other)))
        self.give(TimerFired("recovered"))
        for each in self.workers:
            self.give(Received(each.node_id, self._load()))
        for number in range(20 * workers):
            placed = self.place(f"before-{number}")
            if number % 8:  # else its prompt still waits
                for node_id in placed:
                    first = FirstToken(request_id=f"before-{number}", attempt=1)
                    self.give(Received(node_id, first))

    def give(self, event: Event) -> list[NodeId]:
        """To whom it says something."""
        effects = self.machine.handle(event, 1.0)
        return [to for effect in effects if (to := getattr(effect, "to", None)) is not None]

    def place(self, request_id: str) -> list[NodeId]:
        submit = Submit(
            request_id=request_id,
            attempt=1,
            prompt=bytes(4 * PROMPT_TOKENS),
            sampling=SamplingParams(max_tokens=300, seed=1),
            timeout_s=600.0,
            model=MODEL,
            block_hashes=HASHES,
        )
        self.give(Received(TOKENIZER, submit))
        having = [self.draw.choice(self.workers).node_id for _ in range(8)]
        hints = {node_id: self.draw.randrange(1, 400) for node_id in having}
        placed = self.give(Received(INDEX, Located(request_id=request_id, attempt=1, blocks=hints)))
        assert placed, "nobody had room"
        return placed

    def end(self, request_id: str) -> None:
        self.give(Received(TOKENIZER, StreamEnded(request_id=request_id)))

    def _load(self) -> WorkerLoad:
        steps = [StepSample(2048, 2048 * 9000, 20, 160_000, 0.07)] * 8
        other = self.draw.choice(self.workers).node_id
        return WorkerLoad(
            steps=1,
            running=0,
            waiting=0,
            waiting_tokens=0,
            blocks_free=0,
            blocks_used=0,
            blocks_cached=0,
            blocks_leased=0,
            step_samples=steps,
            transfer_samples=[TransferSample(other, "nixl", 100, 0.01)] * 4,
        )


def _node(node_id: NodeId, role: Role, worker: WorkerInfo | None = None) -> NodeInfo:
    return NodeInfo(node_id=node_id, role=role, epoch=1, address=node_id, worker=worker)


def _worker(number: int) -> NodeInfo:
    role = Role.PREFILL if number % 4 == 0 else Role.DECODE
    info = WorkerInfo(
        model=MODEL,
        kv_layout_id="m/bfloat16/l1",
        num_blocks=50_000,
        block_bytes=1 << 21,
        max_model_len=131_072,
        vocab_size=128_256,
        max_num_seqs=256,
        prefill_budget_tokens=2048,
        accept_decode=role is Role.DECODE,
    )
    return _node(f"{role}-{number}", role, info)


def timed(times_us: list[float]) -> Callable[..., Placement | None]:
    """`place`, with its times."""

    def timed_place(*arguments: Any) -> Placement | None:
        begin_s = time.perf_counter()
        placement = place(*arguments)
        times_us.append((time.perf_counter() - begin_s) * 1e6)
        return placement

    return timed_place


def measure(cluster: Cluster, requests: int) -> dict[str, list[float]]:
    """µs of each request, of the machine and of `place`."""
    times_us: dict[str, list[float]] = {"machine": [], "place": []}
    give = cluster.give

    def timed_give(event: Event) -> list[NodeId]:
        begin_s = time.perf_counter()
        said = give(event)
        elapsed_us = (time.perf_counter() - begin_s) * 1e6
        if isinstance(event, Received) and isinstance(event.message, Located):
            times_us["machine"].append(elapsed_us)
        return said

    cluster.give = timed_give  # type: ignore[method-assign]
    with patch("slipstream.scheduler.dispatcher.place", timed(times_us["place"])):
        for number in range(requests):
            cluster.place(f"r{number}")
            cluster.end(f"r{number}")
    return times_us


def main() -> None:
    parser = argparse.ArgumentParser(prog="placement", description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    for policy in ("cost", "prefix", "load", "random", "round-robin"):
        for mode in ("auto", "always", "never"):
            cluster = Cluster(arguments.workers, policy, mode, random.Random(0))
            words = f"{policy:11} {mode:6} {arguments.workers} workers:"
            for what, times_us in measure(cluster, arguments.requests).items():
                quantiles = statistics.quantiles(times_us, n=100)
                words += f"  {what} median {quantiles[49]:5.0f} us, p99 {quantiles[98]:5.0f} us"
            print(words, flush=True)


if __name__ == "__main__":
    main()
