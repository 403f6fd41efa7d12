"""What a frontend's page says of its requests, of the cluster, and of HTTP."""

import asyncio
import json

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.fakes import FakeGateway, Pause, Server, answer, chat_body, serving, until
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.app import AppSettings
from slipstream.frontend.cluster_metrics import ClusterMetrics, GrowingSum
from slipstream.frontend.gateway import StreamItem
from slipstream.frontend.request_metrics import EDGES, GAPS_MAX, RequestMetrics, Watched
from slipstream.messages import SCHEDULER, NodeInfo, TextDelta, TextPrompt, Tokenize
from slipstream.runtime.metrics import text
from slipstream.types import FinishReason, Role, SamplingParams, Usage, pack_tokens

LABELS = {"model_name": "m"}


def values(page: bytes) -> dict[str, float]:
    """`name` or `name|label=value|…`, without the model -> value."""
    return {
        "|".join(
            [s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()) if k != "model_name")]
        ): s.value
        for family in text_string_to_metric_families(page.decode())
        for s in family.samples
    }


class Requests:
    """The metrics, in a time of its own."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.metrics = RequestMetrics(lambda: self.now_s)
        self.passed_on: list[StreamItem] = []

    def open(self, max_tokens: int = 40, clamp: bool = False) -> Watched:
        submission = Tokenize(
            request_id="r",
            prompt=TextPrompt(text="x"),
            sampling=SamplingParams(max_tokens=max_tokens, seed=1),
            timeout_s=9,
            clamp_max_tokens=clamp,
        )
        return self.metrics.watch(submission, self.passed_on.append, 50)

    def say(
        self, watched: Watched, after_s: float, tokens: int, reason: FinishReason | None = None
    ) -> None:
        self.now_s += after_s
        usage = Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=16) if reason else None
        watched.take(
            TextDelta(
                request_id="r",
                attempt=1,
                position=0,
                tokens=pack_tokens([1] * tokens),
                finish_reason=reason,
                usage=usage,
            )
        )

    def values(self) -> dict[str, float]:
        return values(text(self.metrics.families(LABELS)))


def test_an_answer_is_taken_apart_as_vllm_does() -> None:
    rig = Requests()
    watched = rig.open(max_tokens=50, clamp=True)
    watched.take(20)
    rig.say(watched, 0.25, 1)
    rig.say(watched, 0.002, 1)
    rig.say(watched, 0.004, 2)
    rig.say(watched, 0.5, 0, FinishReason.STOP)
    watched.close()
    assert len(rig.passed_on) == 5
    found = rig.values()
    sums = {
        "time_to_first_token_seconds": (1, 0.25),
        "inter_token_latency_seconds": (2, 0.006),
        "request_time_per_output_token_seconds": (1, 0.002),
        "request_decode_time_seconds": (1, 0.006),
        "e2e_request_latency_seconds": (1, 0.756),
        "request_prompt_tokens": (1, 20),
        "request_prefill_kv_computed_tokens": (1, 4),
        "request_generation_tokens": (1, 4),
        "request_params_max_tokens": (1, 30),
    }
    assert {f"vllm:{name}" for name in sums} == EDGES.keys()
    for name, (count, total) in sums.items():
        assert found[f"vllm:{name}_count"] == count, name
        assert found[f"vllm:{name}_sum"] == pytest.approx(total), name
    assert found["vllm:inter_token_latency_seconds_bucket|le=0.003"] == 1
    assert found["vllm:inter_token_latency_seconds_bucket|le=0.01"] == 2
    assert found["vllm:prompt_tokens_total"] == 20
    assert found["vllm:prompt_tokens_cached_total"] == 16
    assert found["vllm:generation_tokens_total"] == 4
    ends = {
        reason: found[f"vllm:request_success_total|finished_reason={reason}"]
        for reason in FinishReason
    }
    assert ends == {"stop": 1, "length": 0, "abort": 0, "error": 0}


def test_how_requests_end_without_an_answer() -> None:
    rig = Requests()
    left = rig.open()
    left.take(20)
    rig.say(left, 0.1, 1)
    left.close()
    for code in (ErrorCode.CONTEXT_LENGTH, ErrorCode.QUEUE_FULL, ErrorCode.DEADLINE):
        failed = rig.open()
        failed.take(Problem(code=code, message="no"))
        failed.close()
    broken = rig.open()
    rig.say(broken, 0.1, 0, FinishReason.ERROR)
    broken.close()
    found = rig.values()
    assert found["vllm:request_success_total|finished_reason=abort"] == 1
    assert found["vllm:request_success_total|finished_reason=error"] == 2
    assert found["vllm:e2e_request_latency_seconds_count"] == 0
    assert found["vllm:time_to_first_token_seconds_count"] == 1, "it had one"


def test_gaps_are_counted_by_the_thousand_and_when_somebody_asks() -> None:
    rig = Requests()
    watched = rig.open()
    for _ in range(GAPS_MAX + 11):
        rig.say(watched, 0.001, 1)
    assert len(rig.metrics.gaps_s) == 10
    assert rig.values()["vllm:inter_token_latency_seconds_count"] == GAPS_MAX + 10
    assert not rig.metrics.gaps_s


def test_buckets_tell_apart_what_vllms_cannot() -> None:
    for name in ("inter_token_latency_seconds", "time_to_first_token_seconds"):
        assert sum(edge < 0.01 for edge in EDGES[f"vllm:{name}"]) >= 5
    for edges in EDGES.values():
        assert list(edges) == sorted(set(edges))


REQUESTS = {"queued": 3, "locating": 1, "prefilling": 2, "decoding": 5, "finishing": 7}
LOAD = {
    SCHEDULER: {
        "requests_queued": 3,
        "requests_locating": 1,
        "requests_prefilling": 2,
        "requests_decoding": 5,
        "requests_finishing": 7,
    },
    "decode-0": {
        "waiting": 2,
        "blocks_free": 10,
        "blocks_used": 25,
        "blocks_leased": 5,
        "blocks_referenced": 12,
        "prefix_query_tokens_total": 100,
        "prefix_hit_tokens_total": 60,
        "prefix_fetched_tokens_total": 16,
        "preemptions_total": 1,
    },
    "prefill-0": {
        "waiting": 1,
        "blocks_free": 60,
        "blocks_referenced": 8,
        "prefix_query_tokens_total": 50,
        "preemptions_total": 1,
    },
}


def test_the_cluster_in_vllms_words() -> None:
    metrics = ClusterMetrics()
    workers = {node_id: gauges for node_id, gauges in LOAD.items() if node_id != SCHEDULER}
    found = values(text(metrics.cluster(workers, REQUESTS, LABELS)))
    assert found["vllm:num_requests_running"] == 2 + 5 - 3
    assert found["vllm:num_requests_waiting"] == 3 + 1 + 3
    assert found["vllm:kv_cache_usage_perc"] == 20 / 100
    assert found["vllm:cache_config_info|block_size=16|num_gpu_blocks=100"] == 1
    assert found["vllm:prefix_cache_queries_total"] == 150
    assert found["vllm:prefix_cache_hits_total"] == 44
    assert found["vllm:external_prefix_cache_queries_total"] == 106
    assert found["vllm:external_prefix_cache_hits_total"] == 16
    assert found["vllm:num_preemptions_total"] == 2
    empty = values(text(ClusterMetrics().cluster({}, {}, LABELS)))
    assert (empty["vllm:kv_cache_usage_perc"], empty["vllm:num_requests_running"]) == (0, 0)


def test_adapters_in_vllms_words() -> None:
    metrics = ClusterMetrics()
    assert values(text(metrics.adapters(["x", "y"], 12.5, LABELS))) == {
        "vllm:lora_requests_info|max_lora=2|running_lora_adapters=x,y|waiting_lora_adapters=": 12.5
    }
    assert not values(text(metrics.adapters([], 12.5, LABELS)))


def test_each_node_by_itself_with_its_role() -> None:
    node = NodeInfo(node_id="decode-0", role=Role.DECODE, epoch=1, address="a")
    found = values(text(ClusterMetrics().nodes(LOAD, {"decode-0": node})))
    assert found["slipstream_worker_blocks_free|node_id=decode-0|role=decode"] == 10
    assert found["slipstream_worker_blocks_free|node_id=prefill-0|role=unknown"] == 60
    assert found["slipstream_scheduler_requests_queued|node_id=scheduler|role=scheduler"] == 3
    name = "slipstream_scheduler_requests_migrated_total"
    assert found[f"{name}|node_id=scheduler|role=scheduler"] == 0


def test_a_sum_of_counters_does_not_shrink_when_one_begins_anew() -> None:
    total = GrowingSum()
    total.take({"a": 10, "b": 5})
    total.take({"a": 12, "b": 2})
    assert total.value == 10 + 5 + 2 + 2
    total.take({"a": 12})
    total.take({"a": 12, "b": 3})
    assert total.value == 20


async def page(server: Server) -> dict[str, float]:
    async with server.client.get(server.url + "/metrics") as response:
        return values(await response.read())


def statuses(found: dict[str, float]) -> dict[str, float]:
    before = "slipstream_http_responses_total|code="
    return {k.removeprefix(before): v for k, v in found.items() if k.startswith(before) and v}


async def test_posts_are_counted_by_what_they_came_to(server: Server) -> None:
    await server.chat()
    await server.complete()
    await server.post("/v1/chat/completions", b"{")
    await server.client.get(server.url + "/nowhere")
    server.gateway.refuse(Problem(code=ErrorCode.QUEUE_FULL, message="full"))
    await server.chat()
    assert statuses(await page(server)) == {"200": 2, "400": 1, "429": 1}


async def test_a_stream_that_fails_counts_with_the_status_of_its_error(server: Server) -> None:
    lost = Problem(code=ErrorCode.MIGRATIONS, message="lost")
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], lost]
    response = await server.chat(stream=True)
    assert response.status == 200
    assert statuses(await page(server)) == {"500": 1}


@pytest.mark.parametrize(("texts", "moment"), [([], "before_answer"), (["a"], "in_answer")])
async def test_clients_that_leave_are_counted_by_when(
    server: Server, texts: list[str], moment: str
) -> None:
    server.gateway.script = lambda s: [*answer(s, [*texts, "x"])[: len(texts) + 1], Pause(60)]
    url = server.url + "/v1/chat/completions"
    async with aiohttp.ClientSession() as leaving:
        asking = asyncio.create_task(leaving.post(url, json=chat_body(stream=True)))
        await until(lambda: bool(server.gateway.streams))
        if texts:
            await (await asking).content.readany()
        else:
            asking.cancel()
    found = await page(server)
    while not statuses(found):  # its handler has to be told first
        await asyncio.sleep(0.01)
        found = await page(server)
    assert statuses(found) == {"499": 1}
    assert found[f"slipstream_client_disconnects_total|reason={moment}"] == 1


async def test_a_reader_that_was_cut_is_counted_once() -> None:
    gateway = FakeGateway()
    gateway.script = lambda s: [*answer(s, ["x" * 60_000] * 2000)[:-1]]
    async with serving(gateway, AppSettings(write_stall_s=0.3)) as server:
        body = json.dumps(chat_body(stream=True)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        writer.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        await until(lambda: bool(gateway.streams) and bool(gateway.streams[0].closed))
        found = await page(server)
        writer.close()
        assert reader is not None
    assert found["slipstream_slow_readers_cut_total"] == 1
    assert statuses(found) == {"499": 1}
