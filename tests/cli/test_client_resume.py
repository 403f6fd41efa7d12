"""The client goes on with a stream whose server is gone."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from slipstream.client import api as client_api
from slipstream.client.api import Api, ApiError
from slipstream.client.stream import AnswerError, Meter

PIECES = [b'data: {"choices":[{"text":"%c"}]}\n\n' % letter for letter in b"abcdef"]
EVENTS = [b"id: x:%d.1\n%b" % (number, piece) for number, piece in enumerate(PIECES, 1)]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Cutting:
    """Breaks each connection off in the middle of an event; `refusals` come in between."""

    def __init__(self, *lengths: int, refusals: tuple[int, ...] = ()) -> None:
        self.lengths, self.refusals = list(lengths), list(refusals)
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        last = request.headers.get("Last-Event-ID", "")
        self.asked.append(last)
        if last and self.refusals:
            return web.json_response({"error": {}}, status=self.refusals.pop(0))
        begin = int(last[2:-2]) if last else 0
        response = web.StreamResponse()
        await response.prepare(request)
        whole = b"".join(EVENTS[begin:]) + b"data: [DONE]\n\n"
        length = self.lengths.pop(0) if self.lengths else len(whole)
        await response.write(whole[:length])
        if length < len(whole):
            assert request.transport is not None
            request.transport.close()
        return response


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[str]]]:
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> str:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", handler)])
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runners[-1].addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def text_of(url: str) -> str:
    text, meter = "", Meter(0.0)
    async with Api(url) as api:
        async for choices in api.stream("/v1/completions", {}, meter):
            text += "".join(choice.content for choice in choices)
    return text


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_api, "RESUME_AFTER_S", 0.01)


@pytest.mark.parametrize("length", [len(EVENTS[0]), len(EVENTS[0]) + 3, len(EVENTS[0]) + 20, 100])
async def test_nothing_is_lost_or_doubled(
    serve: Callable[[Handler], Awaitable[str]], length: int
) -> None:
    server = Cutting(length, length, refusals=(503, 409))
    assert await text_of(await serve(server.answer)) == "abcdef"
    assert server.asked[0] == "" and all(server.asked[1:]) and len(server.asked) == 5


async def test_a_stream_that_is_gone_is_said(serve: Callable[[Handler], Awaitable[str]]) -> None:
    with pytest.raises(AnswerError, match="cut off"):
        await text_of(await serve(Cutting(100, refusals=(404,)).answer))


async def test_a_server_without_ids_is_not_asked_twice(
    serve: Callable[[Handler], Awaitable[str]],
) -> None:
    server = Cutting(5)
    with pytest.raises(AnswerError, match="cut off"):
        await text_of(await serve(server.answer))
    assert len(server.asked) == 1


async def test_tries_end(serve: Callable[[Handler], Awaitable[str]]) -> None:
    server = Cutting(100, refusals=(503,) * 100)
    with pytest.raises((AnswerError, ApiError)):
        await text_of(await serve(server.answer))
    assert len(server.asked) == client_api.RESUMES_MAX
