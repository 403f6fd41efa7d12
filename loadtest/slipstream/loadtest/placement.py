"""How long the scheduler takes to place one request: `python -m slipstream.loadtest.placement`.

Target P10: at most 250 µs in the median with 64 workers, hashes and hints given.
"""

import argparse
import random
import statistics
import time

from slipstream.messages import NodeInfo, StepSample, TransferSample, WorkerInfo
from slipstream.scheduler.demand import Demand
from slipstream.scheduler.ledger import Ledger, Prompt
from slipstream.scheduler.policy import Rules, place
from slipstream.scheduler.prices import TransferPrices
from slipstream.types import Role


def fleet(workers: int, draw: random.Random) -> tuple[Ledger, TransferPrices]:
    """Workers in the middle of their work: prompts wait, streams run, prices are fitted."""
    ledger, transfers = Ledger(), TransferPrices()
    nodes = []
    for number in range(workers):
        role = Role.PREFILL if number % 4 == 0 else Role.DECODE
        worker = WorkerInfo(
            model="m",
            kv_layout_id="m/bfloat16/l1",
            num_blocks=50_000,
            block_bytes=1 << 21,
            max_model_len=131_072,
            vocab_size=128_256,
            max_num_seqs=256,
            prefill_budget_tokens=2048,
            accept_decode=role is Role.DECODE,
        )
        name = f"{role}-{number}"
        nodes.append(NodeInfo(node_id=name, role=role, epoch=1, address=name, worker=worker))
    ledger.sync(nodes, {node.node_id for node in nodes})
    for view in ledger.views.values():
        for number in range(draw.randrange(0, 40)):
            request_id = f"{view.node_id}/{number}"
            view.give(request_id, 500)
            view.give_stream(request_id, 8000)
            if number < 3:
                view.give_prompt(request_id, Prompt(2048, draw.randrange(100, 9000)), 0.0)
        view.prices.learn([StepSample(2048, 2048 * 9000, 20, 160_000, 0.07)] * 8, 0.0)
        other = draw.choice(nodes).node_id
        transfers.learn(view.node_id, [TransferSample(other, "nixl", 100, 0.01)] * 4, 0.0)
    return ledger, transfers


def main() -> None:
    parser = argparse.ArgumentParser(prog="placement", description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    draw = random.Random(0)
    ledger, transfers = fleet(arguments.workers, draw)
    views = list(ledger.views.values())
    for policy in ("cost", "prefix", "load", "random", "round-robin"):
        for mode in ("auto", "always", "never"):
            rules = Rules(policy, mode)
            times_us = []
            for number in range(arguments.requests):
                hints = {draw.choice(views).node_id: draw.randrange(1, 400) for _ in range(8)}
                demand = Demand(f"r{number}", 8000, 501, hints)
                begin_s = time.perf_counter()
                place(demand, views, transfers, rules, number, 1.0)
                times_us.append((time.perf_counter() - begin_s) * 1e6)
            quantiles = statistics.quantiles(times_us, n=100)
            print(
                f"{policy:11} {mode:6} {arguments.workers} workers: "
                f"median {quantiles[49]:6.0f} us, p99 {quantiles[98]:6.0f} us"
            )


if __name__ == "__main__":
    main()
