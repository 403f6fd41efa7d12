"""A gateway that answers from a script, behind a real HTTP server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from aiohttp import web

from slipstream.core.machine import DeliverCodec, Taken
from slipstream.errors import Problem
from slipstream.frontend.app import NO_BOOKS, AppSettings, Books, build_app, make_runner
from slipstream.frontend.cluster import Cluster, cluster
from slipstream.frontend.gateway import ClusterStatus, ModelCard, StreamItem
from slipstream.messages import (
    ClusterLoad,
    NodeInfo,
    Part,
    PartKind,
    Prompt,
    TextDelta,
    TextLogprob,
    Tokenize,
    TraceFound,
    WorkerInfo,
)
from slipstream.spans import TraceContext
from slipstream.types import FinishReason, Role, Usage, pack_tokens, unpack_tokens

MODEL = "demo"
MAX_MODEL_LEN = 100
VOCAB_SIZE = 1000


class Pause(msgspec.Struct, frozen=True):
    """In a script: silence for so long."""

    seconds: float


Script = Sequence[StreamItem | Pause]


class FakeStream:
    """Plays a script to whoever opened it."""

    def __init__(self, script: Script, put: Callable[[StreamItem], None]) -> None:
        self.closed = 0
        self._playing = asyncio.create_task(self._play(script, put))

    def close(self) -> None:
        self.closed += 1
        self._playing.cancel()

    async def _play(self, script: Script, put: Callable[[StreamItem], None]) -> None:
        for item in script:
            if isinstance(item, Pause):
                await asyncio.sleep(item.seconds)
            else:
                put(item)


def entry(text: str, logprob: float = -0.5, top: tuple[TextLogprob, ...] = ()) -> TextLogprob:
    return TextLogprob(len(text), text, text.encode(), logprob, top)


def answer(submission: Tokenize, texts: Sequence[str], reason: str = "stop") -> list[StreamItem]:
    """One delta a text, one token each; the last one ends the stream."""
    items: list[StreamItem] = [5]
    logprobs = submission.sampling.logprobs
    for i, text in enumerate(texts):
        last = i == len(texts) - 1
        items.append(
            TextDelta(
                request_id=submission.request_id,
                attempt=1,
                position=i,
                tokens=pack_tokens([i]),
                text="" if submission.parse else text,
                parts=[Part(PartKind.CONTENT, text)] if submission.parse else [],
                logprobs=None
                if logprobs is None
                else [
                    entry(text, -0.5, tuple(entry(f"alt{k}", -1.0 - k) for k in range(logprobs)))
                ],
                finish_reason=FinishReason(reason) if last else None,
                stop_reason="END" if last and reason == "stop" else None,
                usage=Usage(prompt_tokens=5, completion_tokens=len(texts), cached_tokens=2)
                if last
                else None,
                path="prefill-0>decode-0",
                decision="policy=cost; ttft_ms=12.0",
            )
        )
    return items


def parted(submission: Tokenize, *steps: Sequence[Part], reason: str = "stop") -> list[StreamItem]:
    """As `answer`, with parts: one delta a step."""
    items = answer(submission, [""] * len(steps), reason)
    told = [
        msgspec.structs.replace(d, parts=list(s)) for d, s in zip(items[1:], steps, strict=True)
    ]
    last = msgspec.structs.replace(told[-1], stop_reason=None)
    return [items[0], *told[:-1], last]


def think(text: str) -> Part:
    return Part(PartKind.REASONING, text)


def speak(text: str) -> Part:
    return Part(PartKind.CONTENT, text)


def call(name: str, arguments: str = "") -> list[Part]:
    """A whole call, its arguments in two pieces."""
    half = len(arguments) // 2
    pieces = [Part(PartKind.ARGUMENTS, text) for text in (arguments[:half], arguments[half:])]
    return [Part(PartKind.CALL, name), *pieces]


class FakeGateway:
    def __init__(self) -> None:
        worker = WorkerInfo(
            model=MODEL,
            kv_layout_id="x",
            num_blocks=64,
            block_bytes=4096,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=8,
            prefill_budget_tokens=64,
            accept_decode=True,
            transports={"shm": "/x"},
        )
        nodes = [
            NodeInfo(node_id="decode-0", role=Role.DECODE, epoch=7, address="a", worker=worker),
            NodeInfo(node_id="scheduler", role=Role.SCHEDULER, epoch=8, address="b"),
        ]
        self.now = ClusterStatus(
            ready=True,
            model=MODEL,
            name=MODEL,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            nodes=nodes,
            models=[ModelCard(name=MODEL, max_model_len=MAX_MODEL_LEN, root=MODEL)],
            retry_after_s=1.5,
        )
        self.script: Callable[[Tokenize], Script] = lambda s: answer(s, ["Hello", " world"])
        self.submissions: list[Tokenize] = []
        self.taken: list[Taken | None] = []
        self.streams: list[FakeStream] = []
        self.coded = DeliverCodec("c", pack_tokens([1, 2]), ("a", "b"), "ab")
        self.codec_calls: list[tuple[Prompt | None, list[int]]] = []
        self.contexts: list[TraceContext] = []
        self.traces_asked: list[str] = []
        self.found: TraceFound | None = TraceFound(call_id="c", kept=3)
        self.broken = False
        self.load = ClusterLoad(gauges={})

    def status(self, name: str = "", key: str = "") -> ClusterStatus:
        if self.broken:
            raise KeyError("/tmp/secret")
        known = name in ("", *(card.name for card in self.now.models))
        return self.now if known else msgspec.structs.replace(self.now, model="")

    def open(
        self,
        submission: Tokenize,
        put: Callable[[StreamItem], None],
        context: TraceContext,
        model: str,
        taken: Taken | None = None,
    ) -> Callable[[], None]:
        msgspec.msgpack.encode(submission)  # it can travel
        self.contexts.append(context)
        self.submissions.append(submission)
        self.taken.append(taken)
        self.streams.append(FakeStream(self.script(submission), put))
        return self.streams[-1].close

    async def codec(self, prompt: Prompt | None, tokens: bytes, model: str) -> DeliverCodec:
        assert model == MODEL
        msgspec.msgpack.encode((prompt, tokens))
        self.codec_calls.append((prompt, unpack_tokens(tokens)))
        return self.coded

    async def trace(self, name: str) -> TraceFound | None:
        self.traces_asked.append(name)
        return self.found

    def cluster(self) -> Cluster:
        return cluster(self.now, self.load, "frontend-0", {"requests_live": 2, "tokens_total": 9})

    def metrics(self) -> bytes:
        return b"slipstream_up 1\n"

    def refuse(self, problem: Problem) -> None:
        self.script = lambda submission: [problem]


class Server:
    """A fake gateway, its HTTP address and a client."""

    def __init__(self, gateway: FakeGateway, url: str, client: aiohttp.ClientSession) -> None:
        self.gateway, self.url, self.client = gateway, url, client

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def post(self, path: str, body: object, **headers: str) -> aiohttp.ClientResponse:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        sent = {"Content-Type": "application/json", **headers}
        response = await self.client.post(self.url + path, data=data, headers=sent)
        await response.read()
        return response

    async def chat(self, **members: object) -> aiohttp.ClientResponse:
        return await self.post("/v1/chat/completions", chat_body(**members))

    async def complete(self, **members: object) -> aiohttp.ClientResponse:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": "Hi", **members})


def chat_body(**members: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **members}


@asynccontextmanager
async def serving(
    gateway: FakeGateway, settings: AppSettings, books: Books = NO_BOOKS
) -> AsyncIterator[Server]:
    runner = make_runner(build_app(gateway, settings, books), shutdown_timeout_s=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession(headers={"Accept": "text/event-stream"}) as client:
            yield Server(gateway, f"http://127.0.0.1:{port}", client)
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool]) -> None:
    """The server has no event for the test to wait for, so this looks again and again."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
