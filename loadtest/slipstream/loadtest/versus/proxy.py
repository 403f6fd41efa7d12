"""A router for two vLLM servers, one that computes prompts and one that goes on from their KV:
`python -m slipstream.loadtest.versus.proxy --port P --prefill URL --decode URL`.

vLLM has none in the box. A request goes to prefill for one token; what prefill says of the KV goes
with the request to decode, whose stream is passed on as it comes.
"""

import argparse
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

_KV_WANTED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_PATH = "/v1/completions"


def application(prefill: str, decode: str) -> web.Application:
    session: aiohttp.ClientSession

    async def connections(app: web.Application) -> Any:
        nonlocal session
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout
        ) as session:
            yield

    async def complete(request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=dict[str, Any])
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": _KV_WANTED}
        first.pop("stream_options", None)
        async with session.post(prefill + _PATH, json=first) as reply:
            if reply.status != 200:
                return web.Response(status=reply.status, body=await reply.read())
            kv = (await reply.json())["kv_transfer_params"]
        async with session.post(decode + _PATH, json={**body, "kv_transfer_params": kv}) as reply:
            response = web.StreamResponse(status=reply.status)
            response.content_type = reply.content_type
            await response.prepare(request)
            async for data in reply.content.iter_any():
                await response.write(data)
        return response

    async def models(request: web.Request) -> web.Response:
        async with session.get(f"{decode}/v1/models") as reply:
            return web.json_response(await reply.json(), status=reply.status)

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.cleanup_ctx.append(connections)
    app.add_routes(
        [web.post(_PATH, complete), web.get("/v1/models", models), web.get("/health", health)]
    )
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, help="URL of the server for prompts")
    parser.add_argument("--decode", required=True, help="URL of the server for tokens")
    arguments = parser.parse_args()
    app = application(arguments.prefill, arguments.decode)
    web.run_app(app, host="127.0.0.1", port=arguments.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
