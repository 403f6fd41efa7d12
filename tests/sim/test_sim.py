"""The simulated cluster keeps its promises, and would be caught breaking them."""

import inspect
import json
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from types import FunctionType

import pytest

from sim.__main__ import run_seed
from sim.faults import KINDS
from slipstream.core.batching import Batcher
from slipstream.core.fetcher import Fetcher
from slipstream.core.lender import Lender
from slipstream.core.machine import SetTimer
from slipstream.core.reading import LeasedRead, Reads
from slipstream.core.worker import WorkerMachine
from slipstream.core.worker_adapters import WorkerAdapters
from slipstream.frontend.machine import FrontendMachine
from slipstream.scheduler.adapters import Adapters
from slipstream.scheduler.dispatcher import Dispatcher
from slipstream.scheduler.ledger import WorkerView
from slipstream.scheduler.machine import SchedulerMachine
from slipstream.tokenizer.machine import TokenizerMachine

SEEDS = 1000
"""`make sim SEEDS=20000` tries more."""
BUG_SEEDS = 2000
FOUND: dict[str, int] = json.loads(Path(__file__).with_name("found.json").read_text())
"""The seed by which each planted bug was found last: it is looked at first."""


def test_every_request_ends_once_and_right_and_nothing_stays_held() -> None:
    counts: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    resumes: Counter[str] = Counter()
    errors = []
    with ProcessPoolExecutor(2) as pool:
        for outcome in pool.map(run_seed, range(SEEDS), chunksize=20):
            counts += outcome.counts
            ends += outcome.ends
            resumes += outcome.resumes
            if outcome.error:
                errors.append(f"seed {outcome.seed}: {outcome.error}")
    assert not errors, "\n".join(errors[:5])
    missing = {*KINDS, "reordering"} - counts.keys()
    assert not missing, f"never happened: {missing}"
    assert ends["done"] > 5 * SEEDS
    assert resumes["resumed"] > SEEDS / 5 and resumes["beyond"]


def test_a_seed_replays_identically_in_another_process() -> None:
    command = [sys.executable, "-m", "sim", "--seed", "7"]
    environ = {"PYTHONPATH": ":".join(sys.path)}
    runs = [
        subprocess.run(command, env=environ | {"PYTHONHASHSEED": str(n)}, capture_output=True)
        for n in (1, 2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr.decode()
    assert (
        runs[0].stdout == runs[1].stdout == f"seed 7: ok, trace {run_seed(7).trace:08x}\n".encode()
    )


# --- Planted bugs: each must be found -------------------------------------------------------------


Plant = Callable[[pytest.MonkeyPatch], None]


def _edited(owner: type, name: str, text: str, other: str) -> Plant:
    """A plant that changes one expression in a method's source."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        function: FunctionType = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        assert text in source, f"{name} no longer says {text!r}"
        space = dict(function.__globals__)
        exec(source.replace(text, other), space)
        patch.setattr(owner, name, space[name])

    return plant


def _both(*plants: Plant) -> Plant:
    """A bug and the defence behind it, which would hide it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for each in plants:
            each(patch)

    return plant


def _without_timer(owner: type, key: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        handle = owner.handle

        def forgetful(self: object, event: object, now_s: float) -> list[object]:
            effects = handle(self, event, now_s)
            return [e for e in effects if not (isinstance(e, SetTimer) and e.key.startswith(key))]

        patch.setattr(owner, "handle", forgetful)

    return plant


BUGS: dict[str, Plant] = {
    "a release is dropped": _edited(LeasedRead, "release", "return [Send(", "return [] and [Send("),
    "blocks of a running READ are freed": _edited(Reads, "free", "if read.pulling:", "if False:"),
    "blocks of a running step are freed": _edited(
        Batcher, "remove", "if not job.flying:", "if True:"
    ),
    "blocks of the second of two running steps are freed": _edited(
        Batcher, "land", "if job.dropped and not job.flying:", "if job.dropped:"
    ),
    "what was proposed and wrong counts as computed": _edited(
        Batcher, "advance", "len(job.tokens) - 1", "row.start + row.num_tokens + row.drafts"
    ),
    "what was read is not verified": _edited(
        Reads, "land", "list(done.digests) != read.digests[read.pulled : read.pull_end]", "False"
    ),
    "what a fetch builds on is kept for ever": _edited(
        Fetcher, "_let_go", "self.pool.release(fetch.kept)", "pass"
    ),
    "a fetch comes from the wrong blocks": _edited(
        Lender, "borrow", "self.pool.match(hashes)", "self.pool.match(hashes)[::-1]"
    ),
    # The scheduler's question to a tokenizer that has forgotten a stream would mend it.
    "a stale epoch is taken for the living one": _both(
        _edited(FrontendMachine, "_place", "self._epochs.get(lost[0]) == lost[1]", "True"),
        _edited(SchedulerMachine, "_submit", "and not submit.repeated", "and False"),
    ),
    "a repeated submission is taken for a fresh one": _edited(
        SchedulerMachine, "_begin", "if not submit.repeated:", "if True:"
    ),
    "the worker has no tick": _without_timer(WorkerMachine, "tick"),
    "the scheduler has no tick": _without_timer(SchedulerMachine, "tick"),
    "the scheduler waits for the index for ever": _without_timer(SchedulerMachine, "locate"),
    "the scheduler recovers for ever": _without_timer(SchedulerMachine, "recovered"),
    "READs may hang for ever": _edited(Reads, "stuck", "r.due_s <= due_s", "False"),
    "a step may hang for ever": _without_timer(WorkerMachine, "step"),
    "a new attempt forgets what its answer must be": _edited(
        TokenizerMachine, "_tokenize", "known.encoding)", "known.encoding._replace(grammar=''))"
    ),
    "a stream begins anew where it was to go on": _edited(
        FrontendMachine, "_open", "request.accepted += taken.accepted", "pass"
    ),
    "the tokenizer has no tick": _without_timer(TokenizerMachine, "tick"),
    "a request goes to another model's worker": _edited(
        Dispatcher, "_views", "view.worker.model == lane.model", "True"
    ),
    "a request goes where there is no room for it": _edited(
        WorkerView, "serves", "and request.longest <= self.tokens_max", ""
    ),
    "a request goes where its adapter is not": _both(
        _edited(WorkerView, "serves", "request.adapter in self.adapters and", ""),
        _edited(WorkerAdapters, "has", "not adapter_id or adapter_id in self._held", "True"),
    ),
    "blocks of one adapter serve another": _edited(
        WorkerMachine, "_admit", "message.salt, message.adapter", "message.salt"
    ),
    "an adapter that nobody can ask for stays": _edited(
        Adapters, "tick", "if over or not adapter.retired", "if not adapter.retired"
    ),
    "a worker that comes later lacks what is wanted": _edited(
        Adapters, "_load", "there = {", "return\n    there = {"
    ),
}


def _first_found(bug: str, seeds: range) -> int | None:
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        first = next((seed for seed in seeds if run_seed(seed).error), None)
    assert first is None or not run_seed(first).error, f"seed {first} fails without the bug"
    return first


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    if bug in FOUND and _first_found(bug, range(FOUND[bug], FOUND[bug] + 1)) is not None:
        return
    parts = [range(start, start + 20) for start in range(0, BUG_SEEDS, 20)]
    with ProcessPoolExecutor(2) as pool:
        found = pool.map(_first_found, repeat(bug), parts)
        first = next((seed for seed in found if seed is not None), None)
        pool.shutdown(cancel_futures=True)
    assert first is not None, f"{BUG_SEEDS} seeds pass although {bug}"
