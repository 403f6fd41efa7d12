"""For each promise one way to break it: a line of ours changed, as a mistake would change it."""

import msgspec


class Break(msgspec.Struct, frozen=True):
    promise: str
    mistake: str
    file: str
    old: str
    """Stands in the file exactly once."""
    new: str
    test: str
    """One that the promise names; it must fail."""


BREAKS = (
    Break(
        *("R1", "no time budget ever ends"),
        "services/slipstream/scheduler/request.py",
        *("if now_s < self.deadline_s:", "if True:"),
        "sim/test_sim.py::test_every_request_ends_once_and_right_and_nothing_stays_held",
    ),
    Break(
        *("R2", "blocks are read to each other's places"),
        "shared/slipstream/core/reading.py",
        "local_blocks=tuple(read.local[read.pulled : read.pull_end])",
        "local_blocks=tuple(read.local[read.pulled : read.pull_end][::-1])",
        "e2e/test_exactness.py::test_every_prompt_through_shared_memory",
    ),
    Break(
        *("R3", "digests are not compared"),
        "shared/slipstream/core/reading.py",
        *("elif list(done.digests) != read.digests[read.pulled : read.pull_end]:", "elif False:"),
        "core/test_handover.py::test_what_is_not_verified_is_computed_again",
    ),
    Break(
        *("R4", "what was told before a move is told again"),
        "shared/slipstream/core/job.py",
        *("num_accepted=len(accepted),", "num_accepted=0,"),
        "core/test_worker.py::test_a_later_attempt_goes_on_after_the_accepted_tokens",
    ),
    Break(
        *("R5", "leases never lapse"),
        "shared/slipstream/core/lease.py",
        *("if lease.expires_s <= now_s]", "if False]"),
        "core/test_lender.py::test_a_lease_that_nobody_renews_lapses_and_frees_its_blocks",
    ),
    Break(
        *("R6", "nobody is too late"),
        "services/slipstream/scheduler/admission.py",
        *("if first_s <= limit_s:", "if True:"),
        "scheduler/test_admission.py::test_who_stands_too_far_behind_is_told_at_once",
    ),
    Break(
        *("R6", "any number is taken"),
        "services/slipstream/scheduler/admission.py",
        *("if live >= settings.max_requests and not begun:", "if False:"),
        "scheduler/test_machine.py::test_a_full_house_says_when_to_come_back",
    ),
    Break(
        *("R7", "who kills workers is sent to the next one"),
        "services/slipstream/scheduler/suspects.py",
        *("if len(suspects) == 1 and not others:", "if False:"),
        "scheduler/test_suspects.py::test_who_is_lost_twice_without_a_token_is_not_tried_a_third_time",
    ),
    Break(
        *("R8", "an error of Redis ends the index"),
        "services/slipstream/kvindex/store.py",
        "        try:\n            result = await operation\n",
        "        result = await operation\n        try:\n            pass\n",
        "e2e/test_redis_faults.py::test_no_request_fails_and_hits_come_back",
    ),
    Break(
        *("R9", "a frontend that drains leaves its streams"),
        "services/slipstream/frontend/machine.py",
        "if self.draining and not self._exited and not self._requests and not self._calls:",
        "if self.draining and not self._exited:",
        "frontend/test_machine_http.py::test_drain_lets_running_answers_end",
    ),
    Break(
        *("R10", "a step may hang for ever"),
        "shared/slipstream/core/step_watch.py",
        *('return SetTimer("step", now_s + self._limit_s)', 'return CancelTimer("step")'),
        "core/test_step_watch.py::test_a_step_that_hangs_ends_the_worker_after_ten_seconds",
    ),
    Break(
        *("R11", "services outlive their supervisor"),
        "services/slipstream/cli/supervisor.py",
        *("libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL.value)", "pass"),
        "cli/test_serve.py::test_killed_supervisor_leaves_no_process_and_the_next_one_sweeps",
    ),
    Break(
        *("R12", "one token too much is counted"),
        "services/slipstream/tokenizer/stream.py",
        *("completion_tokens=len(self.tokens),", "completion_tokens=len(self.tokens) + 1,"),
        "tokenizer/test_machine.py::test_from_prompt_to_end",
    ),
    Break(
        *("R13", "clients with keys share their prefixes"),
        "services/slipstream/frontend/callers.py",
        *('f"key/{self.tenant}/{salt}"', 'f"key/{salt}"'),
        "frontend/test_callers.py::test_no_two_clients_share_a_prefix",
    ),
    Break(
        *("R13", "a salt is not part of a block's name"),
        "shared/slipstream/core/prefix.py",
        *("kv_layout_id, salt, *(", 'kv_layout_id, "", *('),
        "core/test_blocks.py::test_hashes_chain_and_keep_namespaces_apart",
    ),
    Break(
        *("R14", "a worker of another model is used"),
        "services/slipstream/scheduler/fleet.py",
        *("n.worker is not None and fingerprint_of(n.worker) == fingerprint", "True"),
        "scheduler/test_fleet.py::test_a_foreign_model_takes_no_part",
    ),
)
