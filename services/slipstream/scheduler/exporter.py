"""Brings spans to a collector: in batches, from a bounded queue, and never in anybody's way."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import aiohttp

from slipstream.core.machine import Counted, Effect, Event, ExportTrace
from slipstream.scheduler.otlp import count_spans, encode, load_proto
from slipstream.spans import Trace

QUEUE_SPANS_MAX = 16_384
"""What comes while so many wait is dropped."""
BATCH_SPANS = 256
"""A batch ends with the trace that reaches it. It is made on the loop, in a few milliseconds."""
GATHER_S = 1.0
POST_TIMEOUT_S = 5.0
TRIES = 4
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 8.0
LAST_POST_S = 1.0
"""For what is left when the process ends."""
_RETRYABLE = frozenset({429, 502, 503, 504})

_log = logging.getLogger(__name__)


class OtlpExporter:
    """Executor of the scheduler; it has this one effect."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: without `/v1/traces`. StartError if opentelemetry-proto is not installed."""
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        self._proto = load_proto()
        self._queue: deque[Trace] = deque()
        self._waiting = 0
        """Spans in the queue."""
        self._news = asyncio.Event()
        self._sent = self._dropped = 0
        self._well = True
        self._session: aiohttp.ClientSession | None = None
        self._sending: asyncio.Task[None] | None = None
        self._post: Callable[[Event], None] = lambda event: None

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        timeout = aiohttp.ClientTimeout(total=POST_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout)
        self._sending = asyncio.create_task(self._run())
        self._post(Counted(self._counters()))

    def execute(self, effect: Effect) -> None:
        assert isinstance(effect, ExportTrace)
        spans = count_spans(effect.trace)
        if self._waiting + spans > QUEUE_SPANS_MAX:
            self._drop(spans)
            return
        self._queue.append(effect.trace)
        self._waiting += spans
        self._news.set()

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            with suppress(asyncio.CancelledError):
                await self._sending
        if self._session is not None:
            try:
                async with asyncio.timeout(LAST_POST_S):
                    while self._queue:
                        await self._try(self._batch())
            except TimeoutError:
                pass
            finally:
                await self._session.close()

    def _counters(self) -> dict[str, float]:
        return {"otlp_spans_sent_total": self._sent, "otlp_spans_dropped_total": self._dropped}

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER_S)
            self._news.clear()
            while self._queue:
                batch = self._batch()
                try:
                    await self._send(batch)
                except Exception:  # noqa: BLE001 (what cannot be said must not keep back the rest)
                    _log.exception("a batch of spans cannot be sent")
                    self._drop(sum(map(count_spans, batch)))

    def _batch(self) -> list[Trace]:
        batch: list[Trace] = []
        spans = 0
        while self._queue and spans < BATCH_SPANS:
            batch.append(self._queue.popleft())
            spans += count_spans(batch[-1])
        self._waiting -= spans
        return batch

    async def _send(self, batch: list[Trace]) -> None:
        """With the tries that OTLP asks for; then it is gone."""
        wait_s = RETRY_FIRST_S
        for _ in range(TRIES - 1):
            if await self._try(batch):
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)
        if not await self._try(batch):
            self._drop(sum(map(count_spans, batch)))

    async def _try(self, batch: list[Trace]) -> bool:
        """Whether there is nothing more to try: taken, or refused for good."""
        assert self._session is not None
        headers = {"Content-Type": "application/x-protobuf"}
        spans = sum(map(count_spans, batch))
        try:
            body = encode(self._proto, batch)
            async with self._session.post(self._url, data=body, headers=headers) as reply:
                status = reply.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._ill(str(error) or type(error).__name__)
            return False
        if status in _RETRYABLE:
            self._ill(f"HTTP {status}")
            return False
        if status >= 300:
            self._ill(f"HTTP {status}")
            self._drop(spans)
            return True
        if not self._well:
            _log.info("OTLP collector %s takes spans again", self._url)
        self._well = True
        self._sent += spans
        self._post(Counted(self._counters()))
        return True

    def _ill(self, why: str) -> None:
        """One line, until it is well again."""
        if self._well:
            _log.warning("OTLP collector %s: %s", self._url, why)
        self._well = False

    def _drop(self, spans: int) -> None:
        self._dropped += spans
        self._post(Counted(self._counters()))
