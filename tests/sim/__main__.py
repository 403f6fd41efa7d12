"""`python -m sim --seeds 200` runs many seeds; `--seed N` replays one, and ends as it ended."""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from sim.cluster import Cluster
from sim.faults import KINDS

ENOUGH_SEEDS = 200
"""With so many, every kind of fault must have happened."""


@dataclass
class Outcome:
    seed: int
    error: str = ""
    trace: int = 0
    events: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    resumes: Counter[str] = field(default_factory=Counter)


def run_seed(seed: int) -> Outcome:
    """One run; whatever breaks in it is its outcome."""
    outcome = Outcome(seed)
    cluster = Cluster(seed)
    try:
        cluster.run()
    except Exception as error:  # noqa: BLE001 - any exception is a finding, with its seed
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.trace, outcome.events = cluster.world.trace, cluster.world.events
    outcome.counts = cluster.faults.counts
    outcome.resumes = cluster.counts
    outcome.ends = Counter(client.ended or "none" for client in cluster.clients.values())
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="run seeds 0 … N-1")
    parser.add_argument("--seed", type=int, help="run this one, in this process, with a traceback")
    parser.add_argument("--jobs", type=int, default=None, help="processes; default: one per core")
    parser.add_argument("--show", action="store_true", help="with --seed: print every event")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        cluster = Cluster(arguments.seed)
        if arguments.show:
            cluster.world.show = print
        cluster.run()
        print(f"seed {arguments.seed}: ok, trace {cluster.world.trace:08x}")
        return 0
    started_s = time.monotonic()
    total: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    resumes: Counter[str] = Counter()
    failed: list[Outcome] = []
    events = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(run_seed, range(arguments.seeds), chunksize=4):
            total += outcome.counts
            ends += outcome.ends
            resumes += outcome.resumes
            events += outcome.events
            if outcome.error:
                failed.append(outcome)
                print(f"seed {outcome.seed}: {outcome.error}", flush=True)
    elapsed_s = time.monotonic() - started_s
    print(f"{arguments.seeds} seeds, {events} events, {elapsed_s:.1f} s; {len(failed)} failed")
    print("requests:", ", ".join(f"{name} {count}" for name, count in sorted(ends.items())))
    print("resumed: ", ", ".join(f"{name} {count}" for name, count in sorted(resumes.items())))
    print("faults:  ", ", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    missing = sorted({*KINDS, "reordering"} - total.keys())
    if missing and arguments.seeds >= ENOUGH_SEEDS:
        print(f"never happened: {', '.join(missing)}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
