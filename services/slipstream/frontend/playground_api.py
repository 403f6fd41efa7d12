"""The playground: a page at `/` that chats with the model and shows the cluster at work.

A fixed set of files, read once at the start: no path of a client reaches the file system.
"""

import hashlib
from collections.abc import Mapping
from importlib import resources

import msgspec
from aiohttp import web

from slipstream.frontend import info_api

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGE = "index.html"
NAMES = (
    PAGE,
    "style.css",
    "panel.css",
    "icon.svg",
    "main.js",
    "models.js",
    "chat.js",
    "message.js",
    "settings.js",
    "snippets.js",
    "stream.js",
    "cluster.js",
    "panel.js",
    "flows.js",
    "page.js",
)

HEADERS = {
    # Nothing from elsewhere, nothing inline, and no string that becomes markup or code.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    # Kept, but asked for each time: a page of one version never meets a script of another.
    "Cache-Control": "no-cache",
}


class _File(msgspec.Struct, frozen=True):
    body: bytes
    content_type: str
    etag: str


def _load() -> Mapping[str, _File]:
    folder = resources.files("slipstream.frontend") / "playground"
    found = {}
    for name in NAMES:
        body = (folder / name).read_bytes()
        etag = hashlib.sha256(body).hexdigest()[:32]
        found[name] = _File(body, _TYPES[name.rpartition(".")[2]], etag)
    return found


FILES = web.AppKey("playground", Mapping[str, _File])


def install(app: web.Application) -> None:
    app[FILES] = _load()
    app.add_routes([web.get("/", index), web.get("/playground/{name}", file)])


async def index(request: web.Request) -> web.Response:
    """The page for browsers, which name `text/html`; JSON for everybody else."""
    if "text/html" in request.headers.get("Accept", ""):
        response = _answer(request, request.app[FILES][PAGE])
    else:
        response = await info_api.index(request)
    response.headers["Vary"] = "Accept"
    return response


async def file(request: web.Request) -> web.Response:
    found = request.app[FILES].get(request.match_info["name"])
    if found is None:
        raise web.HTTPNotFound
    return _answer(request, found)


def _answer(request: web.Request, found: _File) -> web.Response:
    known = any(etag.value in ("*", found.etag) for etag in request.if_none_match or ())
    response = web.Response(status=304) if known else web.Response(body=found.body)
    response.headers.update(HEADERS)
    response.headers["Content-Type"] = found.content_type
    response.etag = found.etag
    return response
