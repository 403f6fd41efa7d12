"""Which tokens run in a step, on the simulator's device: wrong KV makes wrong tokens there."""

import random

import pytest

from core.builders import decode, job_of, prefill
from sim.device import EOS, Device, right_answer
from slipstream.core.batching import SCORED_TOKENS_MAX, Batcher
from slipstream.core.blocks import BlockPool
from slipstream.core.job import Job
from slipstream.core.machine import BatchPlan
from slipstream.types import BLOCK_TOKENS


class Bench:
    def __init__(
        self, num_blocks: int = 16, max_num_seqs: int = 4, budget_tokens: int = 32, **more: int
    ):
        self.pool = BlockPool(num_blocks)
        self.batcher = Batcher(self.pool, max_num_seqs, budget_tokens, **more)
        self.device = Device(num_blocks)
        self.ended: list[Job] = []

    def add(self, request_id: str, prompt: list[int], **params: object) -> Job:
        job = job_of(decode(request_id, prompt, **params))  # type: ignore[arg-type]
        self.batcher.add(job)
        return job

    def plan(self) -> BatchPlan:
        plan = self.batcher.plan()
        assert plan is not None
        return plan

    def land(self, plan: BatchPlan) -> None:
        self.device.admit(plan)
        outputs, _ = self.device.run(plan)
        tokens = {(output.request_id, output.attempt): output.tokens for output in outputs}
        for job, row in self.batcher.land(plan.step):
            for token in tokens[job.key] if row.sample else ():
                job.append(token, None)
                if job.settle(frozenset({EOS}), 10_000):
                    break
            self.batcher.advance(job, row)
            if job.finish_reason is not None:
                self.batcher.remove(job)
                self.ended.append(job)
        self.pool.check()

    def step(self) -> dict[str, tuple[int, int]]:
        """Request -> the span of tokens that one step computed."""
        plan = self.plan()
        self.land(plan)
        return {row.request_id: (row.start, row.start + row.num_tokens) for row in plan.rows}

    def fill(self) -> None:
        """All steps that may be in flight."""
        while (plan := self.batcher.plan()) is not None:
            check_plan(self, plan)

    def land_one(self) -> None:
        if self.batcher.in_flight:
            self.land(self.batcher.in_flight[0].plan)

    def run(self) -> None:
        self.fill()
        while self.batcher.in_flight:
            self.land_one()
            self.fill()
        assert not self.batcher.waiting and not self.batcher.running


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 64) for _ in range(length)]


def output(job: Job) -> list[int]:
    return job.tokens[job.num_prompt :]


# --- Chunks ---------------------------------------------------------------------------------------


def test_chunks_end_on_block_boundaries_except_the_last() -> None:
    bench = Bench(budget_tokens=40)
    bench.add("r", prompt_of(75), ignore_eos=True)
    assert [bench.step() for _ in range(4)] == [
        {"r": (0, 32)},
        {"r": (32, 64)},
        {"r": (64, 75)},
        {"r": (75, 76)},
    ]


def test_a_row_samples_only_where_its_tokens_end() -> None:
    bench = Bench(budget_tokens=32)
    job = bench.add("r", prompt_of(40), ignore_eos=True)
    plans = []
    for _ in range(3):
        plans.append(bench.plan())
        bench.land(plans[-1])
    (first,), (second,), (third,) = (plan.rows for plan in plans)
    assert [row.sample for row in (first, second, third)] == [False, True, True]
    assert [row.position for row in (second, third)] == [0, 1]
    assert [len(plan.admitted) for plan in plans] == [1, 0, 0], "the device is told once"
    assert plans[0].admitted[0].tokens == tuple(job.tokens[:40])
    assert third.tokens == (job.tokens[40],), "the sample of one step is the input of the next"


def test_prompts_share_the_budget_and_streams_are_not_held_up_by_it() -> None:
    bench = Bench(budget_tokens=40)
    bench.add("a", prompt_of(30, 1), ignore_eos=True)
    second = bench.add("b", prompt_of(60, 2), ignore_eos=True)
    assert bench.step() == {"a": (0, 30)}, "10 tokens are left, not a block"
    assert second.block_ids == [], "who waits holds none"
    assert bench.step() == {"a": (30, 31), "b": (0, 32)}
    assert bench.step() == {"a": (31, 32), "b": (32, 60)}
    assert bench.step() == {"a": (32, 33), "b": (60, 61)}


def test_a_step_scores_so_many_tokens_of_prompts_and_holds_nobody_else_up() -> None:
    """Their logits are there at once, `[tokens, vocab]`."""
    bench = Bench(num_blocks=200, budget_tokens=2048)
    bench.add("a", prompt_of(600, 1), ignore_eos=True, prompt_logprobs=0)
    bench.add("b", prompt_of(500, 2), ignore_eos=True, prompt_logprobs=0)
    bench.add("c", prompt_of(600, 3), ignore_eos=True)
    assert bench.step() == {"a": (0, SCORED_TOKENS_MAX), "c": (0, 600)}
    rest = SCORED_TOKENS_MAX - 88
    assert bench.step() == {"a": (512, 600), "b": (0, rest // 16 * 16), "c": (600, 601)}
    assert bench.step() == {"a": (600, 601), "b": (rest // 16 * 16, 500), "c": (601, 602)}


def test_prompts_have_the_budget_to_themselves() -> None:
    bench = Bench(budget_tokens=32)
    for name in "ab":
        bench.add(name, prompt_of(10, ord(name)), ignore_eos=True)
    assert bench.step() == {"a": (0, 10), "b": (0, 10)}
    bench.add("c", prompt_of(32, 3), ignore_eos=True)
    assert bench.step() == {"a": (10, 11), "b": (10, 11), "c": (0, 32)}


def test_one_step_at_a_time() -> None:
    bench = Bench()
    bench.add("a", prompt_of(5))
    plan = bench.plan()
    bench.add("b", prompt_of(5))
    assert bench.batcher.busy and bench.batcher.plan() is None
    bench.land(plan)
    assert not bench.batcher.busy and set(bench.step()) == {"a", "b"}


# --- The prefix cache -----------------------------------------------------------------------------


def test_a_prefix_is_computed_once() -> None:
    bench = Bench(budget_tokens=256)
    stem = prompt_of(48)
    bench.add("a", [*stem, 1], max_tokens=1)
    bench.step()
    again = bench.add("again", [*stem, 1], ignore_eos=True)
    longer = bench.add("longer", stem + prompt_of(10, 7), ignore_eos=True)
    other = bench.add("other", [*stem, 1], salt="of another client", ignore_eos=True)
    assert bench.step() == {"again": (48, 49), "longer": (48, 58), "other": (0, 49)}
    assert [job.cached_tokens for job in (again, longer, other)] == [48, 48, 0]
    assert (bench.batcher.hit_tokens, bench.batcher.queried_tokens) == (96, 49 + 49 + 58 + 49)


def test_the_last_token_is_computed_in_any_case() -> None:
    """Its logits are what is wanted, and no block keeps those."""
    bench = Bench(budget_tokens=256)
    for name in ("a", "again"):
        bench.add(name, prompt_of(48), max_tokens=1, ignore_eos=True)
        ((start, end),) = bench.step().values()
        assert start < end == 48
    assert output(bench.ended[0]) == output(bench.ended[1])
    assert start >= 32, "all but the last block were there"


def test_what_an_earlier_attempt_made_counts_as_cached_prompt_at_most() -> None:
    bench = Bench(budget_tokens=256)
    bench.add("a", prompt_of(40), max_tokens=30, ignore_eos=True)
    bench.run()
    job = bench.ended[0]
    again = job_of(decode("a", prompt_of(40), attempt=2, accepted=output(job)[:20], max_tokens=30))
    bench.batcher.add(again)
    assert bench.step() == {"a": (48, 60)}
    assert again.cached_tokens == 40


# --- Room -----------------------------------------------------------------------------------------


def test_admission_needs_the_blocks_of_all_tokens_and_nobody_overtakes() -> None:
    bench = Bench(num_blocks=4, budget_tokens=16)
    first = bench.add("first", prompt_of(20, 1), max_tokens=2, ignore_eos=True)
    large = bench.add("large", prompt_of(40, 2), max_tokens=1)
    bench.add("small", prompt_of(3, 3), max_tokens=1)
    assert bench.step() == {"first": (0, 16)}
    assert bench.step() == {"first": (16, 20)}, "2 of 3 blocks are free: not even a first chunk"
    assert large.block_ids == [] and large.num_computed == 0
    assert bench.step() == {"first": (20, 21)}
    assert bench.ended == [first]
    assert bench.step() == {"large": (0, 16)}


def test_the_youngest_is_preempted_and_goes_on_where_it_was() -> None:
    bench = Bench(num_blocks=4, budget_tokens=64)
    jobs = [
        bench.add(name, prompt_of(15, seed), max_tokens=30, ignore_eos=True)
        for seed, name in enumerate("ab")
    ]
    late = bench.add("late", prompt_of(50, 9), max_tokens=1)
    while not bench.batcher.preemptions:
        bench.step()
    old, young = jobs
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert list(bench.batcher.waiting) == [young, late], "back to the head of the queue"
    assert bench.batcher.waiting_tokens == len(young.tokens) + len(late.tokens) + 1
    bench.run()
    assert bench.ended == [old, young, late]
    for job in bench.ended:
        prompt = job.tokens[: job.num_prompt]
        assert output(job) == right_answer(prompt, job.sampling)[0], job.request_id
    assert young.cached_tokens == 0, "its own tokens, found again, are no hit of its prompt"


def test_never_more_rows_than_sequences() -> None:
    """Hand-overs come in with their KV and are not asked whether there is a row for them."""
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        job = job_of(decode(name, prompt_of(4), ignore_eos=True))
        job.block_ids, job.num_computed = bench.pool.allocate(1) or [], 3
        bench.batcher.add_computed(job)
    bench.add("d", prompt_of(4), ignore_eos=True)
    assert set(bench.step()) == {"a", "b"}
    bench.batcher.remove(bench.batcher.running[0])
    assert set(bench.step()) == {"b", "c"}, "d waits: two run already"


# --- Removal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["land", "crash"])
def test_blocks_of_a_job_dropped_in_flight_wait_for_the_end_of_the_step(end: str) -> None:
    bench = Bench(budget_tokens=64)
    dropped = bench.add("dropped", prompt_of(20))
    kept = bench.add("kept", prompt_of(5, 1), ignore_eos=True)
    plan = bench.plan()
    bench.batcher.remove(dropped)
    assert [bench.pool.references[block] for block in dropped.block_ids] == [1, 1]
    if end == "land":
        bench.land(plan)
    else:
        bench.device.admit(plan)
        assert [job for job, _ in bench.batcher.land(plan.step)] == [kept]
    assert dropped.block_ids == [] and bench.pool.num_empty == 15
    assert len(dropped.tokens) == 20, "nothing of the step is taken over"
    assert bench.plan().dropped == (("dropped", 1),), "the device may forget it"


def test_a_waiting_job_leaves_nothing_behind() -> None:
    bench = Bench()
    bench.batcher.remove(bench.add("r", prompt_of(20)))
    assert bench.batcher.plan() is None and bench.pool.num_empty == 16


def test_blocks_of_a_failed_step_are_not_found_by_anybody() -> None:
    bench = Bench(budget_tokens=64)
    job = bench.add("r", prompt_of(40))
    bench.plan()
    for failed, _ in bench.batcher.land(1):
        bench.batcher.remove(failed)
    assert job.block_ids == [] and bench.pool.hashes() == []


# --- Hand-overs -----------------------------------------------------------------------------------


def test_digests_are_asked_for_once_and_only_for_what_will_be_announced() -> None:
    bench = Bench(budget_tokens=32)
    job = job_of(prefill("r", prompt_of(40)))
    bench.batcher.add(job)
    first = bench.plan()
    assert first.digest_blocks == tuple(job.block_ids[:2]), "full ones"
    bench.land(first)
    job.announced_blocks = 2
    assert bench.plan().digest_blocks == (job.block_ids[2],), "with the last chunk, the tail too"

    bench.pool.digests[job.block_ids[0]] = b"known"
    again = job_of(prefill("again", prompt_of(40)))
    bench.batcher.add(again)
    shared = job.block_ids[:2]
    bench.batcher.remove(job)
    bench.batcher.land(bench.batcher.in_flight[0].plan.step)
    plan = bench.plan()
    assert again.block_ids[:2] == shared
    assert plan.digest_blocks == tuple(again.block_ids[1:])


# --- Drawn schedules ------------------------------------------------------------------------------


def check_plan(bench: Bench, plan: BatchPlan) -> None:
    batcher = bench.batcher
    assert 0 < len(plan.rows) <= batcher.max_num_seqs
    assert sum(row.num_tokens for row in plan.rows if row.num_tokens > 1) <= batcher.budget_tokens
    flight = batcher.in_flight[-1]
    assert flight.plan is plan
    for job, row in zip(flight.jobs, plan.rows, strict=True):
        *before, last = job.flying
        assert last is row
        start = job.num_computed + sum(each.num_tokens for each in before)
        drawn = sum(each.sample for each in before)
        assert (row.start, row.after_previous) == (start, drawn > 0)
        assert row.tokens == tuple(job.tokens[start : start + len(row.tokens)])
        end = start + row.num_tokens
        assert row.sample == (end == len(job.tokens) + drawn)
        assert row.sample or end % BLOCK_TOKENS == 0
        assert row.position == job.num_output + drawn
        drafts = sum(each.drafts for each in job.flying)
        assert end + drafts <= len(row.block_ids) * BLOCK_TOKENS
        assert not row.drafts or row.position + drafts < job.sampling.max_tokens
        written = row.block_ids[row.start // BLOCK_TOKENS :]
        assert all(bench.pool.references[block] == 1 for block in written), "others read there"


@pytest.mark.parametrize("seed", range(120))
def test_drawn_schedules_give_the_answers_of_one_undisturbed_machine(seed: int) -> None:
    draw = random.Random(seed)
    sizes = draw.choice((6, 9, 20)), draw.choice((1, 2, 5)), draw.choice((16, 40, 100))
    ahead = {"steps_in_flight": draw.choice((1, 2, 3)), "draft_tokens": draw.choice((0, 2, 5))}
    bench = Bench(*sizes, **ahead)
    stem = prompt_of(60, seed)
    live: list[Job] = []
    for number in range(80):
        if draw.random() < 0.4:
            prompt = stem[: draw.randrange(60)] + prompt_of(draw.choice((1, 5, 17)), number)
            live.append(bench.add(f"r{number}", prompt, max_tokens=draw.choice((1, 4, 18))))
        bench.fill()
        if live and draw.random() < 0.1:
            bench.batcher.remove(live.pop(draw.randrange(len(live))))
        bench.land_one()
        live = [job for job in live if job not in bench.ended]
    bench.run()
    assert all(job in bench.ended for job in live)
    for job in bench.ended:
        assert output(job) == right_answer(job.tokens[: job.num_prompt], job.sampling)[0]
    assert bench.pool.num_available == bench.pool.num_blocks
