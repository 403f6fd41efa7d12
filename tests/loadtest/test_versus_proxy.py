"""The router in front of two vLLM servers: what each of them is asked, and what the client gets."""

from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from slipstream.loadtest.versus.client import Client, new_session
from slipstream.loadtest.versus.proxy import application

KV = {"remote_block_ids": [3, 4], "remote_host": "localhost", "remote_port": 5600}
ASKED = {"model": "m", "prompt": [1, 2], "max_tokens": 2, "stream": True}


class Servers:
    def __init__(self, prefill_status: int = 200) -> None:
        self.prefill: list[dict[str, Any]] = []
        self.decode: list[dict[str, Any]] = []
        self._status = prefill_status

    async def at_prefill(self, request: web.Request) -> web.Response:
        self.prefill.append(await request.json())
        return web.json_response({"kv_transfer_params": KV}, status=self._status)

    async def at_decode(self, request: web.Request) -> web.StreamResponse:
        self.decode.append(await request.json())
        reply = web.StreamResponse()
        reply.content_type = "text/event-stream"
        await reply.prepare(request)
        for _ in range(2):
            await reply.write(b'data: {"choices":[{"text":"x"}]}\n\n')
        await reply.write(b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n')
        return reply


def serving(handler: Any) -> TestServer:
    app = web.Application()
    app.add_routes([web.post("/v1/completions", handler)])
    return TestServer(app)


def url_of(server: TestServer) -> str:
    return str(server.make_url("")).rstrip("/")


async def test_prefill_computes_and_decode_goes_on() -> None:
    servers = Servers()
    async with serving(servers.at_prefill) as prefill, serving(servers.at_decode) as decode:
        app = application(url_of(prefill), url_of(decode))
        async with TestServer(app) as proxy, new_session() as session:
            answer = await Client(session, url_of(proxy), "m").complete([1, 2], 2)
    assert answer.tokens == 2
    ((first,), (second,)) = servers.prefill, servers.decode
    assert first["max_tokens"] == 1 and not first["stream"] and "stream_options" not in first
    assert first["kv_transfer_params"]["do_remote_decode"]
    assert second["kv_transfer_params"] == KV
    assert second["max_tokens"] == 2 and second["stream"]
    assert first["prompt"] == second["prompt"] == [1, 2] and first["ignore_eos"]


async def test_what_prefill_refuses_is_refused() -> None:
    servers = Servers(prefill_status=429)
    async with serving(servers.at_prefill) as prefill, serving(servers.at_decode) as decode:
        app = application(url_of(prefill), url_of(decode))
        async with TestClient(TestServer(app)) as client:
            reply = await client.post("/v1/completions", json=ASKED)
            assert reply.status == 429
    assert not servers.decode
