"""Every fault, in the order in which one stack can have them: each row finds it whole."""

import signal

from slipstream.loadtest.chaos import blocks, clients, services, stores, workers
from slipstream.loadtest.chaos.checker import BROKEN
from slipstream.loadtest.chaos.row import Row

NOTHING, LATER, PAUSE = "nothing", "a later first token", "a pause"
SHORT = ("F09", "F10", "F12", "F15", "F24", "F26", "F31", "F46", "F51")
"""What must pass whenever anything is changed."""
STOP, TERM = signal.SIGSTOP, signal.SIGTERM
KILLS = "e2e/test_kill.py::test_answers_are_right_whoever_dies"
REDIS = "e2e/test_redis_faults.py::test_no_request_fails_and_hits_come_back"
READS = "e2e/test_transfer_faults.py::test_wrong_bytes_a_wrong_epoch_a_lost_lease"
held = workers.held

WORKERS = (
    Row("F08", "Q", "prefill worker killed", LATER, workers.prefill_dies_with_a_queue),
    Row("F09", "P", "prefill worker killed", LATER, held("prefill", "prompt_hold"), sim=("crash",)),
    Row(
        *("F10", "X", "prefill worker killed before the last block is read", LATER),
        held("decode", "hold", victim=1),
        tests=("e2e/test_transfer_faults.py::test_the_lender_dies_or_hangs_in_mid_read",),
    ),
    Row(
        *("F11", "X", "prefill worker killed before it confirms", LATER),
        workers.lender_dies_at_the_last_word,
        tests=("core/test_receiver.py::test_the_word_of_a_lost_source_is_not_waited_for",),
    ),
    Row(
        *("F12", "X", "prefill worker begins anew, READs name its predecessor", LATER),
        workers.stale_descriptors,
        tests=("kv/test_transport.py::test_another_epoch_is_refused",),
    ),
    Row(
        *("F13", "P", "prefill worker stopped for 6 s", LATER),
        held("prefill", "prompt_hold", STOP),
        sim=("pause",),
    ),
    Row(
        *("F13x", "X", "prefill worker stopped for 6 s while it is read", LATER),
        held("decode", "hold", STOP, victim=1),
        tests=("core/test_receiver.py::test_blocks_of_a_running_read_are_in_quarantine",),
    ),
    Row("F14", "X", "decode worker killed while it reads", LATER, held("decode", "hold")),
    Row(
        *("F15", "D", "decode worker killed: first, middle, last token", PAUSE),
        workers.decode_dies_at_each_token,
        tests=(KILLS,),
        sim=("crash",),
    ),
    Row("F15s", "D", "decode worker stopped for 6 s", PAUSE, workers.decode_stands_still),
    Row("F16", "D", "all decode workers killed at once", PAUSE, workers.every_decode_dies),
    Row(
        *("F17", "D", "a step fails as a device does", PAUSE, workers.a_step_fails),
        tests=("core/test_worker.py::test_a_failed_step_ends_its_attempts_and_the_worker_goes_on",),
        sim=("step_failure",),
    ),
    Row(
        *("F18", "D", "logits that are no numbers", "500 `internal_error`, of one request"),
        *(workers.no_number, "twins", ("internal_error",)),
        tests=("core/test_worker.py::test_a_row_without_a_token_ends_its_request",),
    ),
    Row("F19", "D", "a step that does not end", PAUSE, workers.a_step_hangs, sim=("hang",)),
    Row(
        *("F20", "D", "a decode worker ten times slower", "slower answers", workers.one_is_slow),
        tests=(
            "scheduler/test_prices.py::test_a_worker_that_changes_its_pace_is_believed_in_two_reports",
        ),
        sim=("slow",),
    ),
    Row(
        *("F54", "Q", "a worker joins under load", NOTHING, workers.a_worker_joins_and_leaves),
        tests=("containers/test_stack.py::test_scaled_up_and_down_under_load_no_request_fails",),
    ),
    Row(
        *("F55", "D", "a worker leaves in order", NOTHING),
        tests=("core/test_handover.py::test_a_drained_worker_leaves_when_it_is_empty",),
        sim=("drain",),
        same="F54",
    ),
    Row(
        *("F58", "P", "a request that kills who computes it", "500 `request_quarantined`"),
        *(workers.poison, "twins", ("request_quarantined",)),
        sim=("poison",),
        tests=(
            "scheduler/test_suspects.py::test_who_is_lost_twice_without_a_token_is_not_tried_a_third_time",
        ),
    ),
)
BLOCKS = (
    Row("F24", "X", "a byte is flipped", LATER, blocks.spoilt("flip"), sim=("corruption",)),
    Row("F25", "X", "right bytes at wrong places", LATER, blocks.spoilt("swap"), tests=(READS,)),
    Row("F26", "X", "one READ in twenty fails", LATER, blocks.some_reads_fail, sim=("loss",)),
    Row(
        *("F27", "X", "a READ stalls at nine tenths and comes too late", LATER),
        blocks.a_read_stalls,
        tests=("kv/test_transport.py::test_a_silent_peer_ends_at_the_deadline_and_comes_too_late",),
        sim=("hang",),
    ),
    Row(
        *("F28", "X", "a CUDA IPC handle of a dead process", LATER),
        tests=("kv/test_cuda_ipc.py::test_a_handle_that_leads_elsewhere_is_not_used",),
    ),
    Row(
        *("F29", "X", "shared memory is unlinked", LATER, blocks.shared_memory_goes),
        tests=("kv/test_segment.py::test_no_room_is_one_line_with_both_numbers",),
    ),
)
STORES = (
    Row("F31", "Q", "Redis killed", NOTHING, stores.blow("redis"), tests=(KILLS,)),
    Row("F32", "Q", "Redis 500 ms late", NOTHING, stores.slow, sim=("store_outage",)),
    Row("F33", "any", "FLUSHALL", NOTHING, stores.spoil(stores.flush), tests=(REDIS,)),
    Row("F34", "Q", "entries of workers that died", NOTHING, stores.stale, sim=("lie",)),
    Row("F35", "Q", "Redis lies", NOTHING, stores.spoil(stores.lies), tests=(REDIS,)),
    Row("F35x", "Q", "Redis holds other types", NOTHING, stores.spoil(stores.wrong_types)),
    Row(
        *("F36", "Q", "Redis takes no writes", NOTHING, stores.read_only),
        tests=("kvindex/test_connect.py::test_behind_a_sentinel_and_through_a_failover",),
    ),
    Row("F37", "Q", "index service killed", NOTHING, stores.blow("kvindex-0"), tests=(KILLS,)),
    Row("F39", "Q", "the way to Redis is half-open", NOTHING, stores.half_open, sim=("partition",)),
    Row("F39x", "Q", "Redis stopped for 4 s", NOTHING, stores.blow("redis", STOP), tests=(REDIS,)),
    Row(
        *("F60", "start", "a Redis with the index of an earlier life", NOTHING),
        tests=(
            "kvindex/test_store.py::test_another_epoch_is_a_gap_and_holds_nothing",
            "kvindex/test_store.py::test_a_new_epoch_takes_the_place_of_the_old_one",
        ),
    ),
)
CLIENTS = (
    Row("F46", "T, P, X, D", "a client leaves", NOTHING, clients.one_leaves_in_each_phase),
    Row("F47", "mix", "500 ask and leave at once", "slower answers", clients.a_storm),
    Row(
        *("F48", "D", "a client never reads", NOTHING, clients.one_never_reads),
        tests=("frontend/test_streaming.py::test_a_reader_that_stands_still_is_cut_off",),
    ),
    Row(
        *("F48x", "D", "a slow, sliced connection; a reset", "its own break"),
        *(clients.slow_and_cut_connections, "twins", (BROKEN,)),
    ),
    Row(
        *("F49", "accept", "heads and bodies that do not end", NOTHING, clients.slowloris),
        tests=("frontend/test_bad_input.py::test_a_body_that_never_comes_disturbs_nobody",),
    ),
    Row("F50", "D", "a client half-closes", "its request ends", clients.half_closed),
    Row(
        *("F51", "Q, P, D", "the time budget ends", "504 `deadline_exceeded`"),
        *(clients.out_of_time, "twins", ("deadline_exceeded",)),
        tests=("scheduler/test_machine.py::test_a_deadline_ends_it_wherever_it_is",),
    ),
    Row("F52", "any", "requests of one X-Request-Id at once", NOTHING, clients.two_of_one_name),
    Row(
        *("F53", "any", "API keys are exchanged", NOTHING),
        tests=("frontend/test_callers.py::test_keys_come_and_go_while_it_runs",),
    ),
)
SERVICES = (
    Row(
        *("F03", "T", "tokenizer killed", LATER, held("tokenizer", "encode_hold")),
        tests=("frontend/test_machine_http.py::test_stream_over_a_lost_tokenizer",),
    ),
    Row(
        *("F04", "T", "tokenizer stopped for 6 s", LATER, held("tokenizer", "encode_hold", STOP)),
        sim=("pause",),
    ),
    Row(
        *("F05", "start", "a tokenizer of another model", "503 `not_ready`"),
        tests=("scheduler/test_fleet.py::test_a_foreign_model_takes_no_part",),
    ),
    Row(
        *("F06", "Q, P, D", "scheduler killed", "a pause of those that had not begun"),
        services.scheduler_dies_with_all_phases,
        tests=(KILLS,),
        sim=("crash",),
    ),
    Row(
        *("F07", "D", "scheduler stopped for 11 s", "a pause of those that had not begun"),
        services.scheduler_stands_still,
        sim=("pause",),
    ),
    Row(
        *("F38", "all", "frames lost, repeated, out of order", NOTHING),
        tests=("core/test_link.py::test_every_message_once_in_order",),
        sim=("loss", "duplication", "delay"),
    ),
    Row(
        *("F40", "D", "scheduler to one decode worker cut, not back", PAUSE),
        services.one_way_cut,
        sim=("partition",),
    ),
    Row(
        *("F41", "any", "a peer without a key, or with another role's", NOTHING),
        tests=(
            "runtime/test_curve.py::test_without_a_key_nobody_is_heard",
            "runtime/test_curve.py::test_a_peer_that_cannot_prove_its_role_hears_nothing",
        ),
    ),
    Row(
        *("F42", "any", "nonsense at every socket of the bus", NOTHING),
        services.nonsense_on_the_bus,
        tests=("runtime/test_start.py::test_raw_bytes_on_the_socket_are_survived",),
    ),
    Row(
        *("F43", "any", "a clock jumps", NOTHING),
        tests=(
            "runtime/test_parts.py::test_an_epoch_is_above_the_last_one_whatever_the_clock_says",
        ),
    ),
    Row(
        *("F44", "any", "a disk is full", NOTHING),
        tests=(
            "kv/test_tier.py::test_a_full_disk_drops_and_goes_on",
            "runtime/test_parts.py::test_a_full_recording_ends_and_says_so",
        ),
    ),
    Row(
        *("F45", "accept", "a frontend may open no more files", "refused connections"),
        *(services.no_more_files, "twins", (BROKEN,)),
    ),
    Row(
        *("F57", "start", "a second scheduler", NOTHING, services.a_second_scheduler),
        tests=("runtime/test_start.py::test_a_living_listener_keeps_its_address",),
    ),
    Row(
        *("F56", "start", "model files missing or torn", "503 `not_ready`"),
        tests=(
            "engine/test_worker_process.py::test_what_cannot_start_says_why_in_one_line",
            "cli/test_serve.py::test_child_that_keeps_crashing_before_ready_ends_the_run",
        ),
    ),
    Row("F02", "D", "frontend leaves in order", NOTHING, services.a_frontend_leaves),
    Row(
        *("F01", "any", "frontend killed", "its connections break", services.dies("frontend-1")),
        *("twins", (BROKEN,)),
        tests=("e2e/test_kill.py::test_what_a_dead_frontend_had_is_freed",),
    ),
    Row(
        *("F55r", "all", "every process restarted, one after another", NOTHING),
        services.everyone_leaves_in_turn,
    ),
    Row(
        *("F59", "any", "serve killed with all that it had", "connections break"),
        *(services.everything_dies, "twins", (BROKEN,)),
        tests=(
            "cli/test_serve.py::test_killed_supervisor_leaves_no_process_and_the_next_one_sweeps",
        ),
    ),
)
SMALL = (
    Row("F21", "X", "no room at any decode worker", "a later first token", same="F22"),
    Row(
        *("F22", "D", "the pool is full in the middle", PAUSE, workers.more_than_fits, "small"),
        tests=("core/test_worker.py::test_a_full_pool_preempts_and_every_answer_is_right",),
    ),
    Row(
        *("F23", "Q", "more than any pool holds", "400 `context_length_exceeded`"),
        *(workers.larger_than_any_pool, "small"),
    ),
    Row(
        *("F30", "Q", "Redis was never there", NOTHING),
        same="F22",
        tests=("kvindex/test_process.py::test_it_starts_without_redis_and_ends_at_sigterm",),
    ),
)
ROWS = (*SMALL, *WORKERS, *BLOCKS, *STORES, *CLIENTS, *SERVICES)
