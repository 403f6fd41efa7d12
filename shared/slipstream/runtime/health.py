"""The pages for operators, on a port of their own: /livez, /readyz, /metrics."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from slipstream.runtime.metrics import CONTENT_TYPE
from slipstream.runtime.ports import port_error


async def serve(
    prog: str, host: str, port: int, missing: Callable[[], str], metrics: Callable[[], bytes]
) -> Callable[[], Awaitable[None]]:
    """Listens until what it returns is called. `missing` says why the process is not ready, or "".

    StartError naming the holder of the port if it is taken.
    """

    async def live(request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})  # said by the loop, which therefore turns

    async def ready(request: web.Request) -> web.Response:
        if reason := missing():
            return web.json_response({"status": "not_ready", "reason": reason}, status=503)
        return web.json_response({"status": "ready", "reason": ""})

    async def page(request: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/livez", live), web.get("/readyz", ready), web.get("/metrics", page)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise port_error(prog, "--metrics-port", host, port, error) from None
    return runner.cleanup
