from aiohttp import web


async def openapi(request: web.Request) -> web.Response:
    raise web.HTTPNotFound
