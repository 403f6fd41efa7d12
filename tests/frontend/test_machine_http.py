"""HTTP in front of the real machines: frontend service, frontend and tokenizer machine, and a
stand-in for scheduler and worker."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import pytest

from frontend.fakes import until
from frontend.wired import FRONTEND, TOKENIZERS, World
from slipstream.config import StartError
from slipstream.core.machine import Drain, Effect, Event, Exit
from slipstream.frontend.app import AppSettings
from slipstream.frontend.service import FrontendService
from slipstream.messages import SCHEDULER, ClusterLoad

MODEL = "bytes"
LONG = "wörld 😀 " * 40


class Stack(World):
    """The shell of all of them: turns as fast as the loop lets it, in its own time."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.service = FrontendService(self.frontend, AppSettings(), "127.0.0.1", 0)
        self.exited = False
        self.paused = False

    def execute(self, effect: Effect) -> None:
        if isinstance(effect, Exit):
            self.exited = True
        else:
            self.service.execute(effect)

    def post(self, event: Event) -> None:
        asyncio.get_running_loop().call_soon(self.handle, FRONTEND, event)

    async def turn(self) -> None:
        while True:
            await asyncio.sleep(0.002)
            if not self.paused:
                self.run(0.05)


class Client:
    def __init__(self, stack: Stack, session: aiohttp.ClientSession) -> None:
        self.stack, self.session = stack, session
        self.url = f"http://127.0.0.1:{stack.service.port}"

    def post(self, path: str, **body: object) -> aiohttp.client._RequestContextManager:
        return self.session.post(self.url + path, json={"model": MODEL, **body})

    def chat(self, answer: str, **body: object) -> aiohttp.client._RequestContextManager:
        messages = [{"role": "user", "content": f"Say|{answer}"}]
        return self.post("/v1/chat/completions", messages=messages, **body)

    def get(self, path: str) -> aiohttp.client._RequestContextManager:
        return self.session.get(self.url + path)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    stack = Stack()
    await stack.service.start(stack.post)
    turning = asyncio.create_task(stack.turn())
    try:
        async with aiohttp.ClientSession() as session:
            yield Client(stack, session)
    finally:
        turning.cancel()
        with suppress(asyncio.CancelledError):
            await turning
        await stack.service.close()


async def text_of(response: aiohttp.ClientResponse) -> str:
    assert response.status == 200
    text = ""
    async for line in response.content:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return text


async def test_whole_answer(client: Client) -> None:
    async with client.chat("Héllo", n=2) as response:
        body = await response.json()
    assert response.status == 200
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Héllo", "Héllo"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    assert body["usage"]["prompt_tokens"] == len("Say|Héllo".encode())
    assert body["usage"]["completion_tokens"] == 2 * (len("Héllo".encode()) + 1)
    assert response.headers["x-slipstream-path"] == "decode-0"
    await until(lambda: client.stack.frontend.statistics()["requests_unclosed"] == 0)


async def test_stream_over_a_lost_tokenizer(client: Client) -> None:
    async with client.chat(LONG, stream=True) as response:
        await response.content.readline()
        holder = next(iter(client.stack.cluster.running.values())).tokenizer
        client.stack.crash(holder)
        assert await text_of(response) == LONG
    statistics = client.stack.frontend.statistics()
    assert statistics["moves_total"] == 1


async def test_stream_over_lost_sessions(client: Client) -> None:
    async def cut(holder: str) -> None:
        for tokenizer in sorted(TOKENIZERS, key=lambda name: name != holder) * 2:
            client.stack.cut(FRONTEND, tokenizer)
            await asyncio.sleep(0.01)

    async with client.chat(LONG, stream=True) as response:
        await response.content.readline()
        holder = next(iter(client.stack.cluster.running.values())).tokenizer
        text, _ = await asyncio.gather(text_of(response), cut(holder))
    assert text == LONG
    assert client.stack.frontend.statistics()["moves_total"] >= 1


async def test_a_refusal_of_the_tokenizer_is_an_http_status(client: Client) -> None:
    async with client.chat("x" * 990, max_tokens=50) as response:
        body = await response.json()
    assert (response.status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "990" not in body["error"]["message"] and "994 in the messages" in str(body)


async def test_a_client_that_leaves_ends_its_request(client: Client) -> None:
    async with client.chat(LONG * 2, stream=True) as response:
        await response.content.readline()
        response.close()
    await until(lambda: not client.stack.cluster.running)
    assert client.stack.frontend.statistics()["abandoned_total"] == 1


async def test_codec(client: Client) -> None:
    async with client.post("/tokenize", prompt="hé", return_token_strs=True) as response:
        assert await response.json() == {
            "count": 3,
            "max_model_len": 1000,
            "tokens": list("hé".encode()),
            "token_strs": ["h", "\ufffd", "\ufffd"],
        }
    async with client.post("/detokenize", tokens=list("hé".encode())) as response:
        assert await response.json() == {"prompt": "hé"}


async def test_pages(client: Client) -> None:
    client.stack.send(
        SCHEDULER,
        FRONTEND,
        ClusterLoad(
            gauges={"decode-0": {"running": 3, "blocks_free": 5, "tier_saved_total": 7}},
            blocks_from={"decode-0": {"prefill-0": 4}},
        ),
    )
    await until(lambda: bool(client.stack.frontend.load.gauges))
    async with client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    worker = '{model_name="bytes",node_id="decode-0",role="decode"}'
    assert f"slipstream_worker_blocks_free{worker} 5.0" in lines
    assert "# TYPE slipstream_worker_blocks_free gauge" in lines
    assert f"slipstream_worker_tier_saved_total{worker} 7.0" in lines
    assert "# TYPE slipstream_worker_tier_saved_total counter" in lines
    assert any(line.startswith("slipstream_requests_live{") for line in lines)
    assert "slipstream_ready 1.0" in lines
    assert 'vllm:kv_cache_usage_perc{model_name="bytes"} 0.0' in lines
    async with client.get("/cluster") as response:
        (worker,) = (await response.json())["workers"]
        assert (worker["node_id"], worker["load"]["running"]) == ("decode-0", 3)
        assert worker["load"]["blocks_from"] == {"prefill-0": 4}
    async with client.get("/v1/models") as response:
        (card,) = (await response.json())["data"]
        assert (card["id"], card["max_model_len"]) == (MODEL, 1000)
    async with client.get("/readyz") as response:
        body = await response.json()
        assert (response.status, body["status"], body["model"]) == (200, "ready", MODEL)
        assert {node["node_id"] for node in body["nodes"]} >= {"decode-0", *TOKENIZERS}


async def test_drain_lets_running_answers_end(client: Client) -> None:
    async with client.chat(LONG, stream=True) as response:
        await response.content.readline()
        client.stack.paused = True
        client.stack.post(Drain())
        await until(lambda: client.stack.frontend.draining)
        async with client.get("/readyz") as page:
            assert (page.status, (await page.json())["status"]) == (503, "draining")
        async with client.chat("x") as refused:
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "draining"
        assert not client.stack.exited
        client.stack.paused = False
        assert await text_of(response) == LONG
    await until(lambda: client.stack.exited)


async def test_a_taken_port_is_named(client: Client) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        service = FrontendService(client.stack.frontend, AppSettings(), "127.0.0.1", port)
        with pytest.raises(StartError, match=f"port {port} is taken by pid") as raised:
            await service.start(client.stack.post)
        assert raised.value.exit_code == 5
        await service.close()
