"""What is promised, and the tests and rows that fail if a promise is broken."""

import msgspec


class Promise(msgspec.Struct, frozen=True):
    id: str
    text: str
    rows: tuple[str, ...]
    """Of the catalogue; what is checked in each of them, `all`."""
    tests: tuple[str, ...]


PROMISES = (
    Promise(
        *("R1", "Every accepted request ends exactly once, in time.", ("all",)),
        (
            "sim/test_sim.py::test_every_request_ends_once_and_right_and_nothing_stays_held",
            "loadtest/test_chaos_checker.py::test_a_request_without_an_end",
        ),
    ),
    Promise(
        *("R2", "The same tokens, whatever path, cache or worker made them.", ("all",)),
        (
            "e2e/test_exactness.py::test_every_prompt_through_shared_memory",
            "e2e/test_exactness.py::test_every_prompt_over_the_bus",
            "loadtest/test_chaos_checker.py::test_where_an_answer_parts_from_the_right_one",
        ),
    ),
    Promise(
        *("R3", "No token from KV that was not verified.", ("F24", "F25")),
        (
            "e2e/test_transfer_faults.py::test_wrong_bytes_a_wrong_epoch_a_lost_lease",
            "core/test_handover.py::test_what_is_not_verified_is_computed_again",
        ),
    ),
    Promise(
        *("R4", "A stream outlives its worker: no token lost or doubled.", ("F14", "F15", "F16")),
        (
            "e2e/test_kill.py::test_answers_are_right_whoever_dies",
            "core/test_worker.py::test_a_later_attempt_goes_on_after_the_accepted_tokens",
            "scheduler/test_machine.py::test_a_request_that_every_worker_fails_ends",
            "e2e/test_resume.py::test_a_killed_frontend_s_streams_go_on_at_another_one",
        ),
    ),
    Promise(
        *("R5", "Who leaves, runs out of time or dies holds no KV blocks.", ("F46", "F47", "F51")),
        (
            "e2e/test_kill.py::test_what_a_dead_frontend_had_is_freed",
            "core/test_lender.py::test_a_lease_that_nobody_renews_lapses_and_frees_its_blocks",
            "frontend/test_streaming.py::test_a_client_that_leaves_closes_its_streams",
        ),
    ),
    Promise(
        *("R6", "Too much is refused early; what is taken keeps its target.", ()),
        (
            "loadtest/test_load_locust.py::test_a_step_to_three_times_what_the_server_can_do",
            "scheduler/test_admission.py::test_who_stands_too_far_behind_is_told_at_once",
            "scheduler/test_machine.py::test_a_full_house_says_when_to_come_back",
        ),
    ),
    Promise(
        *("R7", "A bad request harms itself alone.", ("F17", "F18", "F58")),
        (
            "core/test_worker.py::test_a_failed_step_ends_its_attempts_and_the_worker_goes_on",
            "scheduler/test_suspects.py::test_who_is_lost_twice_without_a_token_is_not_tried_a_third_time",
            "e2e/test_bad_inputs.py::test_a_bad_input_gets_its_answer_and_harms_nobody",
        ),
    ),
    Promise(
        *("R8", "Redis and the index cost speed, never an answer.", ("F31", "F32", "F33", "F35")),
        (
            "e2e/test_redis_faults.py::test_no_request_fails_and_hits_come_back",
            "e2e/test_redis_faults.py::test_lying_entries_are_counted_and_put_right",
        ),
    ),
    Promise(
        *("R9", "SIGTERM loses nothing.", ("F02", "F54", "F55r")),
        (
            "cli/test_serve.py::test_sigterm_drains_in_order_and_leaves_nothing",
            "frontend/test_machine_http.py::test_drain_lets_running_answers_end",
            "e2e/test_restarts.py::test_one_process_after_the_other_is_replaced_and_nobody_notices",
        ),
    ),
    Promise(
        *("R10", "Health is the truth.", ("F19",)),
        (
            "frontend/test_api.py::test_readiness",
            "runtime/test_start.py::test_a_machine_that_is_not_ready_says_why",
            "core/test_step_watch.py::test_a_step_that_hangs_ends_the_worker_after_ten_seconds",
            "e2e/test_restarts.py::test_a_worker_that_stands_still_is_killed_and_its_streams_go_on",
        ),
    ),
    Promise(
        *("R11", "Nothing leaks.", ("all",)),
        (
            "e2e/test_accounting.py::test_two_hundred_requests_leave_nothing",
            "cli/test_serve.py::test_killed_supervisor_leaves_no_process_and_the_next_one_sweeps",
            "loadtest/test_chaos_checker.py::test_what_a_soak_may_have_more_of",
        ),
    ),
    Promise(
        *("R12", "Usage is the tokenizer's own count, after a move too.", ("all",)),
        (
            "loadtest/test_chaos_checker.py::test_usage_is_held_against_the_right_answers",
            "tokenizer/test_machine.py::test_from_prompt_to_end",
            "e2e/test_metrics.py::test_an_answer_is_in_the_histograms",
        ),
    ),
    Promise(
        *("R13", "A prefix is shared within its salt alone.", ("F35",)),
        (
            "core/test_blocks.py::test_hashes_chain_and_keep_namespaces_apart",
            "frontend/test_callers.py::test_no_two_clients_share_a_prefix",
            "e2e/test_api_keys.py::test_clients_are_known_limited_and_apart",
        ),
    ),
    Promise(
        *("R14", "Any order of start; before it is ready, 503 with Retry-After.", ("F59",)),
        (
            "runtime/test_cluster.py::test_peers_learn_each_other_and_start_in_any_order",
            "e2e/test_bad_input.py::test_not_ready_is_503_and_a_full_queue_429",
            "scheduler/test_fleet.py::test_a_foreign_model_takes_no_part",
        ),
    ),
)
