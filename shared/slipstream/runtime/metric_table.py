"""What every metric says: name -> help text, by the kind of process whose statistics have it.

Closed: a test holds it against what the services count. Counters in here are shown as 0 before they
have counted anything, for Prometheus does not see the first step of one that appears with it.

A key with words in braces stands for many: each is shown under its own name and, with the words as
labels, under the family's, which is what dashboards ask for.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from slipstream.errors import ERRORS, ErrorCode
from slipstream.types import TRANSPORTS, Role


class Labelled(NamedTuple):
    key: str
    family: str
    help: str
    always: tuple[str, ...] = ()
    """Values of its label, `transport` left aside, that are shown before they have been counted."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(re.findall(r"{(\w+)}", self.key))

    @property
    def counts(self) -> bool:
        return self.key.endswith("_total")

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"{(\w+)}", lambda word: _WORDS[word[1]], self.key))


_WORDS = {
    "transport": f"(?P<transport>{'|'.join(TRANSPORTS)}|none)",
    "code": f"(?P<code>{'|'.join(ERRORS)})",
    "reason": "(?P<reason>[a-z_]+)",
}
_CODES = (
    *(ErrorCode.INVALID_VALUE.value, ErrorCode.CONTEXT_LENGTH.value),
    *(code.value for code, spec in ERRORS.items() if spec.status >= 429),
)
"""That a request can end with once it is past the HTTP handler."""
_READ_CAUSES = ("read", "digest", "expired", "peer", "silent", "malformed")
TRANSFER_CAUSES = (
    *("attach", "closed", "device", "epoch", "internal", "layout", "malformed", "peer", "range"),
    *("size", "socket", "timeout", "transport"),
)
"""As `slipstream.kv.transport.Cause`."""

SHELL = {
    "peers_up": "Peers with which a session stands.",
    "events_total": "Events that the machine has handled.",
    "timers": "Timers that are set.",
    "loop_lag_seconds": "Longest delay of the event loop in the last ten seconds.",
    "bus_frames_sent_total": "Frames given to ZeroMQ.",
    "bus_frames_received_total": "Frames received.",
    "bus_frames_dropped_total": "Frames that found a full queue; the sessions send them again.",
    "bus_frames_resent_total": "Frames sent again because nobody had acknowledged them.",
    "bus_frames_malformed_total": "Frames that were no messages, and were dropped.",
    "bus_frames_unread": "Frames sent that no peer has acknowledged yet.",
    "bus_bytes_sent_total": "Bytes given to ZeroMQ.",
    "bus_bytes_received_total": "Bytes received.",
}

FRONTEND = {
    "requests_live": "Choices asked for whose end the client has not been told.",
    "requests_waiting": "Choices that live and that no tokenizer has.",
    "requests_unclosed": "Ended choices that their HTTP handler has not let go of.",
    "codec_calls": "Calls of /tokenize and /detokenize that wait for an answer.",
    "requests_total": "Choices taken; a request with n choices counts n times.",
    "finished_total": "Choices that ended with an answer.",
    "abandoned_total": "Choices whose client left before their end.",
    "resumed_total": "Choices taken over from a frontend that their client has lost.",
    "moves_total": "Streams given to another tokenizer after theirs was lost.",
    "resyncs_total": "Streams taken up again with the same tokenizer after a broken session.",
    "deltas_skipped_total": "Pieces of text that the client had already, or that came too early.",
    "tokens_total": "Output tokens passed on to HTTP.",
    "journal_bytes": "Of streamed answers, written to Redis and kept there for now.",
    "journal_entries_total": "Pieces of streamed answers written ahead of their clients.",
    "journal_failures_total": "Times that Redis did not answer in time; streams went on without.",
    "journal_skipped_total": "Streamed answers that were not written at all.",
    "journal_fenced_total": "Streams that ended here because another frontend has them.",
    "journal_taken_total": "Journals read to go on with another frontend's stream.",
    "usage_store_up": "1 if Redis took what API keys have used last; 0: each frontend for itself.",
    "usage_exchanges_total": "Exchanges of usage with Redis, of up to 64 clients' periods each.",
    "usage_failures_total": "Exchanges of usage that Redis did not answer in time.",
    "audit_lines_total": "Lines written to the audit log.",
    "audit_dropped_total": "Lines that the audit log lacks: the disk was behind, full or away.",
}
FRONTEND_LABELLED = (
    Labelled(
        "refused_{code}_total", "choices_refused_total", "Choices not taken, by code.", _CODES
    ),
    Labelled(
        *(
            "failed_{code}_total",
            "choices_failed_total",
            "Choices that ended in an error, by code.",
        ),
        _CODES,
    ),
)

TOKENIZER = {
    "streams_live": "Streams that have not ended.",
    "streams_encoding": "Streams whose prompt is being encoded.",
    "streams_orphaned": "Streams whose frontend is silent.",
    "streams_ended": "Ended streams that are kept in case the frontend asks again.",
    "codec_calls": "Calls of /tokenize that wait for a thread.",
    "grammars_compiling": "Grammars of answers that are being compiled.",
    "grammars_total": "Grammars given to the compiler; those it has had of late are not.",
    "grammars_refused_total": "Grammars that are none, or take too long to compile.",
    "grammars_late_total": "Grammars that there was no time or room to compile.",
    "streams_total": "Streams taken, repetitions included.",
    "restarts_total": "Streams begun anew because the frontend had other tokens, or a new attempt.",
    "resyncs_total": "Streams of which the frontend was told what it had missed.",
    "resumes_total": "Streams that the scheduler moved to the next attempt.",
    "prompts_total": "Prompts encoded.",
    "prompt_tokens_total": "Tokens of the prompts encoded.",
    "tokens_total": "Output tokens turned into text.",
    "resends_total": "Times that a worker was asked to say tokens again.",
    "spans_malformed_total": "Spans of tokens that were torn, and were dropped.",
    "taken_over_total": "Streams that went on with another frontend.",
    "cancelled_total": "Streams ended because the client or its frontend was gone.",
}
TOKENIZER_LABELLED = (
    Labelled(
        *(
            "failed_{code}_total",
            "streams_failed_total",
            "Streams that ended in an error, by code.",
        ),
        _CODES,
    ),
)

SCHEDULER = {
    "requests_recovering": "Requests submitted again that may still run on some worker.",
    "requests_locating": "Requests that wait for the index.",
    "requests_queued": "Requests in the queue, for which no worker has room.",
    "requests_probation": "Requests that may kill workers, and wait to run as the only such one.",
    "requests_resuming": "Requests whose next attempt the tokenizer has to submit.",
    "requests_prefilling": "Requests whose prompt a prefill worker computes or hands over.",
    "requests_decoding": "Requests that run on one worker.",
    "requests_finishing": "Requests whose last token the tokenizer has not confirmed.",
    "queued_tokens": "Tokens of the prompts in the queue.",
    "requests_accepted_total": "Requests accepted.",
    "requests_ended_total": "Accepted requests that are over, however they ended.",
    "requests_locates_total": "Questions to the index.",
    "requests_located_total": "Questions to the index that some worker was named for.",
    "requests_located_nowhere_total": "Questions to the index that nobody was named for in time.",
    "requests_adopted_total": "Attempts found running after a restart of the scheduler.",
    "requests_migrated_total": "Attempts given up because a worker failed them.",
    "requests_orphaned_total": "Requests ended because their tokenizer stayed silent.",
    "requests_placed_alone_total": "Placements on one worker.",
    "requests_placed_apart_total": "Placements on a prefill and a decode worker.",
    "requests_placed_fetching_total": "Placements that have a prefix fetched from another worker.",
    "requests_waited_seconds_total": "Time from submission to placement, summed over placements.",
    "ttft_prediction_error_median": "Relative error of the last 64 predicted times to first token.",
    "role_shifts_total": "Workers told to take streams, or to take no more.",
    "nodes": "Processes in the cluster.",
    "otlp_spans_sent_total": "Spans that the OTLP collector has taken.",
    "otlp_spans_dropped_total": "Spans dropped because the collector was behind, or refused them.",
}
SCHEDULER_LABELLED = (
    Labelled(
        *("requests_refused_{code}_total", "refusals_total", "Requests not accepted, by code."),
        _CODES,
    ),
    Labelled(
        *("requests_failed_{code}_total", "failures_total", "Requests ended by an error, by code."),
        _CODES,
    ),
)

WORKER = {
    "accepts_streams": "1: takes prompts and streams; 0: prompts alone.",
    "running": "Requests here that are past the local queue, transfers under way included.",
    "waiting": "Requests in the local queue.",
    "waiting_tokens": "Prompt tokens here that are not computed yet.",
    "blocks_free": "KV blocks with nothing in them.",
    "blocks_used": "KV blocks with contents and no lease.",
    "blocks_cached": "Used KV blocks that a prefix can hit.",
    "blocks_leased": "KV blocks that a lease keeps still for another worker.",
    "blocks_referenced": "KV blocks that something needs now; all others can be had at once.",
    "blocks_quarantined": "KV blocks that a READ which was given up may still write into.",
    "blocks_evicted_total": "Cached KV blocks given up for others.",
    "blocks_pulled_total": "KV blocks that came in hand-overs.",
    "blocks_fetched_total": "KV blocks of prefixes that came from other workers.",
    "blocks_loaded_total": "KV blocks that came from the tiers.",
    "blocks_lent_total": "KV blocks lent to other workers as a prefix.",
    "leases": "Leases that live.",
    "leases_granted_total": "Leases granted.",
    "leases_lapsed_total": "Leases that nobody renewed in time.",
    "preemptions_total": "Requests put back into the local queue for want of KV blocks.",
    "prefix_query_tokens_total": "Tokens of prompts that were begun here.",
    "prefix_hit_tokens_total": "Prompt tokens found instead of computed, wherever they came from.",
    "prefix_fetched_tokens_total": "Prompt tokens found in a tier or at another worker.",
    "index_claims_total": "KV blocks that the index said were here.",
    "index_claims_wrong_total": "KV blocks that the index said were here, and were not.",
    "steps": "Steps planned.",
    "steps_total": "Steps computed.",
    "steps_failed_total": "Steps that failed.",
    "step_seconds_total": "Time spent in steps.",
    "step_rows_total": "Requests in steps, summed over the steps.",
    "prompt_tokens_total": "Prompt tokens computed.",
    "tokens_total": "Output tokens made.",
    "draft_tokens_total": "Tokens proposed by speculation.",
    "draft_tokens_right_total": "Tokens proposed by speculation that were right.",
    "tier_host_blocks": "KV blocks in host memory below the pool.",
    "tier_host_bytes": "Bytes of KV blocks in host memory below the pool.",
    "tier_disk_blocks": "KV blocks in files.",
    "tier_disk_bytes": "Bytes of KV blocks in files.",
    "tier_saved_total": "KV blocks copied down from the pool.",
    "tier_refused_total": "KV blocks not copied down because the disk was behind.",
    "tier_loaded_host_total": "KV blocks loaded from host memory.",
    "tier_loaded_disk_total": "KV blocks loaded from files.",
    "tier_missed_total": "KV blocks asked for that were not there any more.",
    "tier_dropped_total": "KV blocks dropped for room.",
    "tier_bad_total": "KV blocks dropped because they were not what was saved.",
    "tier_swept_total": "Files of an earlier process that were of no use.",
    "tier_write_failures_total": "KV blocks that could not be written to a file.",
}
WORKER_LABELLED = (
    Labelled(
        *("handover_{reason}_total", "handovers_failed_total"),
        "Hand-overs given up, by reason; digest: the bytes were not those announced.",
        _READ_CAUSES,
    ),
    Labelled(
        *("fetch_{reason}_total", "fetches_failed_total"),
        "Prefixes not fetched, by reason; digest: the bytes were not those lent.",
        (*_READ_CAUSES, "absent", "no_room", "tier"),
    ),
    Labelled(
        *("attempts_failed_{reason}_total", "attempts_failed_total"),
        "Attempts that could not go on here, by reason.",
        ("step", "no_token", "unfit", "unheard", "deadline", "prefill_lost", "decode_lost"),
    ),
    Labelled("transfer_{transport}_peers", "transfer_peers", "Peers that the transport serves."),
    Labelled(
        *("transfer_{transport}_gbps", "transfer_gbps"),
        "GB/s of verified READs when peers were measured, the mean over them.",
    ),
    Labelled("transfer_{transport}_reads_total", "transfer_reads_total", "READs that ended well."),
    Labelled("transfer_{transport}_bytes_total", "transfer_bytes_total", "Bytes read."),
    Labelled(
        *("transfer_{transport}_seconds_total", "transfer_seconds_total"),
        "Time that READs took, the wait for a thread included.",
    ),
    Labelled(
        *("transfer_{transport}_failures_{reason}_total", "transfer_failures_total"),
        "READs that failed, by transport and reason.",
        TRANSFER_CAUSES,
    ),
)

KVINDEX = {
    "store_up": "1 if Redis has answered last.",
    "workers": "Workers that tell this kvindex what they hold.",
    "workers_in_step": "Workers of which Redis has all that they said.",
    "lookups_in_flight": "Questions that wait for Redis.",
    "batches_waiting": "Batches of block events that wait for Redis.",
    "index_events_total": "Batches of block events received.",
    "index_snapshots_total": "Snapshots received.",
    "index_gaps_total": "Times that Redis did not hold what was said before.",
    "index_malformed_total": "Messages with torn hashes.",
    "index_store_errors_total": "Operations of Redis that failed or came too late.",
    "index_locates_total": "Questions received.",
    "index_dropped_total": "Questions answered with nothing because too many waited, or too long.",
    "index_lookups_total": "Questions that Redis answered.",
    "index_located_blocks_total": "KV blocks of the longest run found, summed over questions.",
    "store_operations_total": "Operations of Redis that have ended, failed ones included.",
    "store_operation_seconds_total": "Time in operations of Redis, waits for connections included.",
}

KINDS: Mapping[str, tuple[Mapping[str, str], tuple[Labelled, ...]]] = {
    "shell": (SHELL, ()),
    Role.FRONTEND: (FRONTEND, FRONTEND_LABELLED),
    Role.TOKENIZER: (TOKENIZER, TOKENIZER_LABELLED),
    Role.SCHEDULER: (SCHEDULER, SCHEDULER_LABELLED),
    Role.PREFILL: (WORKER, WORKER_LABELLED),
    Role.DECODE: (WORKER, WORKER_LABELLED),
    Role.KVINDEX: (KVINDEX, ()),
}
"""By role; `shell`: what every process has on its own metrics port."""

HTTP = {
    "slipstream_ready": "1 if this frontend can serve a request now.",
    "slipstream_http_responses_total": "Answers to POST requests by HTTP status. A stream that"
    " fails counts with the status of its error, a client that left as 499.",
    "slipstream_client_disconnects_total": "Clients that left, by when: before_answer, in_answer.",
    "slipstream_key_requests_total": "POST requests let in, by API key and model.",
    "slipstream_key_tokens_total": "Tokens of prompts and answers, by API key and model.",
    "slipstream_key_prompt_tokens_total": "Tokens of prompts, by API key and model.",
    "slipstream_key_cached_tokens_total": "Tokens of prompts that were found, by API key and"
    " model.",
    "slipstream_key_completion_tokens_total": "Tokens of answers, by API key and model.",
    "slipstream_key_refused_total": "Requests over the limits of their API key.",
    "slipstream_shadow_requests_total": "Copies of requests that a model computed to be looked"
    " at, by how they ended.",
    "slipstream_slow_readers_cut_total": "Connections closed because their client did not read.",
}
"""Of a frontend's shell, by full name; so is VLLM."""

VLLM = {
    "vllm:num_requests_running": "Requests placed on workers and not in a worker's queue, of the"
    " whole cluster.",
    "vllm:num_requests_waiting": "Requests in the scheduler's or a worker's queue, of the whole"
    " cluster.",
    "vllm:kv_cache_usage_perc": "Share of the KV blocks of all workers that something needs now;"
    " 1 is all of them.",
    "vllm:cache_config_info": "1; how many KV blocks of how many tokens all workers have.",
    "vllm:lora_requests_info": "Unix time; which LoRA adapters may be asked for.",
    "vllm:prefix_cache_queries_total": "Tokens of prompts that workers began, of the whole"
    " cluster.",
    "vllm:prefix_cache_hits_total": "Tokens of prompts that the computing worker had in its pool,"
    " of the whole cluster.",
    "vllm:external_prefix_cache_queries_total": "Tokens of prompts that the computing worker did"
    " not have, of the whole cluster.",
    "vllm:external_prefix_cache_hits_total": "Tokens of prompts that came from a tier or another"
    " worker, of the whole cluster.",
    "vllm:num_preemptions_total": "Requests put back into a worker's queue for want of KV blocks,"
    " of the whole cluster.",
    "vllm:spec_decode_num_draft_tokens_total": "Tokens proposed, of the whole cluster.",
    "vllm:spec_decode_num_accepted_tokens_total": "Proposed tokens that were right, of the whole"
    " cluster.",
    "vllm:prompt_tokens_total": "Prompt tokens of requests of this frontend, counted at the first"
    " output token.",
    "vllm:prompt_tokens_cached_total": "Prompt tokens of finished requests of this frontend that"
    " were found instead of computed.",
    "vllm:generation_tokens_total": "Output tokens that came to this frontend.",
    "vllm:request_success_total": "Requests of this frontend that ended, by reason; abort: the"
    " client left, error: the fault was ours.",
    "vllm:time_to_first_token_seconds": "From a checked request to its first output token.",
    "vllm:inter_token_latency_seconds": "Between two arrivals of output tokens of one request.",
    "vllm:request_time_per_output_token_seconds": "Mean time for one output token after the first,"
    " of finished requests with two or more.",
    "vllm:e2e_request_latency_seconds": "From a checked request to its end, of finished requests.",
    "vllm:request_decode_time_seconds": "From the first output token to the last, of finished"
    " requests.",
    "vllm:request_prompt_tokens": "Prompt tokens of finished requests.",
    "vllm:request_prefill_kv_computed_tokens": "Prompt tokens of finished requests that were not"
    " found in a cache.",
    "vllm:request_generation_tokens": "Output tokens of finished requests.",
    "vllm:request_params_max_tokens": "Most output tokens allowed, of finished requests.",
}
