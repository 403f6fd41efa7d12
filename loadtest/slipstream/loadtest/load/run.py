"""One run: sends what the plan says, and keeps a sample of each request."""

import itertools
import time
from collections.abc import Callable
from functools import partial

import msgspec

from slipstream.loadtest.load.answers import Answers
from slipstream.loadtest.load.asks import Ask, Asks
from slipstream.loadtest.load.connection import Reply, Server, accepted_retry_after
from slipstream.loadtest.load.numbers import token_events
from slipstream.loadtest.load.plan import Plan, Span
from slipstream.loadtest.load.sample import FAILURES, Sample
from slipstream.loadtest.load.scenarios import CAPACITY, SCENARIOS, arrivals, phases
from slipstream.loadtest.load.settings import Settings
from slipstream.loadtest.load.stream import Stream

IDLE_S = 0.1
WINDOWS = 21
"""Halves of a measurement of capacity that are looked at, each a little later."""

Fire = Callable[[str, str, float, int, str], None]
"""Kind and name of a metric, ms, bytes or tokens, a failure or empty."""
Spawn = Callable[[Callable[[], None]], object]


class Run:
    def __init__(
        self, settings: Settings, server: Server, model: str, spawn: Spawn, fire: Fire
    ) -> None:
        """`spawn` runs something beside what runs now."""
        self.settings = settings
        self.scenario = SCENARIOS[settings.scenario]
        self.samples: list[Sample] = []
        self.not_sent = 0
        """Arrivals while --max-in-flight were in flight."""
        self.capacity_rps = settings.capacity_rps
        self.answers = Answers()
        self.plan = Plan(phases(self.scenario, settings), settings.drain_s)
        self._asks = Asks(settings, self.scenario.mix(settings))
        self._server, self.model, self._spawn, self._fire = server, model, spawn, fire
        self._origin_s = time.monotonic()
        self._origin_cpu_s = time.process_time()
        self._numbers = itertools.count()
        self._in_flight: dict[int, tuple[Sample, Stream]] = {}

    def now_s(self) -> float:
        return time.monotonic() - self._origin_s

    @property
    def cpu_share(self) -> float:
        """Of one core, that this process has taken."""
        return (time.process_time() - self._origin_cpu_s) / max(self.now_s(), 1e-9)

    def users(self) -> int | None:
        """How many are wanted now; None: the run is over. To be called about once a second."""
        before = len(self.plan.spans)
        self.plan.advance(self.now_s(), len(self._in_flight))
        if self.plan.over:
            return None
        if len(self.plan.spans) > before and self.plan.part[0].load:
            if not self.capacity_rps:
                tokens = self.settings.output_tokens
                self.capacity_rps = capacity_rps(self.plan.spans, self.samples, tokens)
            # Not by a user: locust ends those that are too many now, and asks nobody.
            self._spawn(self._arrive)
        return self.plan.part[0].users or 1

    def act(self) -> None:
        """What a user does next."""
        now_s = self.now_s()
        if not self.plan.spans or not self.plan.part[0].users or not self.plan.asks(now_s):
            time.sleep(IDLE_S)
        else:
            self._converse(self._asks.first(next(self._numbers)), now_s)

    def finish(self, interrupted: bool) -> None:
        """What is in flight now is lost, unless somebody has ended the run before its time."""
        if interrupted:
            self._in_flight.clear()
        for sample, stream in self._in_flight.values():
            sample.problem = f"in flight {self.settings.drain_s:g} s after the last phase"
            self._measure(sample, stream)
            self._keep(sample)
        self._in_flight.clear()

    def _arrive(self) -> None:
        begin_s = self.plan.begin_s
        for at_s in arrivals(self.plan.part, self.capacity_rps, self.settings.seed):
            time.sleep(max(0.0, begin_s + at_s - self.now_s()))
            if len(self._in_flight) >= self.settings.max_in_flight:
                self.not_sent += 1
                continue
            ask = self._asks.first(next(self._numbers))
            self._spawn(partial(self._converse, ask, begin_s + at_s))

    def _converse(self, first: Ask, planned_s: float) -> None:
        ask: Ask | None = first
        while ask is not None and (text := self._answer(ask, planned_s)) is not None:
            ask = self._asks.next(ask, text)
            planned_s = self.now_s()
            if not self.plan.asks(planned_s):
                return

    def _answer(self, ask: Ask, planned_s: float) -> str | None:
        """None: it was refused to the end, left, or has failed."""
        for attempt in range(self.settings.retries + 1):
            sample = Sample(
                phase=self.plan.phase_name(planned_s),
                prompt=ask.name,
                kind=ask.kind,
                attempt=attempt,
                planned_s=planned_s,
                sent_s=self.now_s(),
            )
            wait_s, text = self._attempt(ask, sample)
            if sample.outcome != "refused":
                return text if sample.outcome == "right" else None
            self._wait(wait_s)
            planned_s = self.now_s()
            if attempt == self.settings.retries or not self.plan.asks(planned_s):
                sample.refused_finally = True
                break
        return None

    def _wait(self, wait_s: float) -> None:
        """As told by the server, but not longer than there is anything to ask."""
        until_s = self.now_s() + wait_s
        while (now_s := self.now_s()) < until_s and self.plan.asks(now_s):
            time.sleep(min(IDLE_S, until_s - now_s))

    def _attempt(self, ask: Ask, sample: Sample) -> tuple[float, str]:
        """How long to wait before the next one, and the answer."""
        key = id(sample)
        stream = Stream()
        self._in_flight[key] = sample, stream
        reply = self._server.chat(self._body(ask), ask, stream)
        wait_s = 0.0
        self._measure(sample, stream)
        if reply.status == 429:
            try:
                wait_s = accepted_retry_after(reply.retry_after)
                sample.outcome = "refused"
            except ValueError as error:
                sample.outcome, sample.problem = "error", f"HTTP 429: {error}"
        else:
            self._judge(ask, sample, reply, stream)
        if self._in_flight.pop(key, None) is not None:
            self._keep(sample)
        return wait_s, stream.text

    def _measure(self, sample: Sample, stream: Stream) -> None:
        sample.times_s = [at_s - self._origin_s for at_s in stream.times_s]
        sample.end_s = self.now_s()
        sample.tokens = stream.tokens or len(stream.times_s)
        sample.prompt_tokens, sample.cached_tokens = stream.prompt_tokens, stream.cached_tokens

    def _judge(self, ask: Ask, sample: Sample, reply: Reply, stream: Stream) -> None:
        """Of an answer that is no refusal: its outcome and what is wrong with it."""
        if reply.status != 200:
            status = f"HTTP {reply.status}: " if reply.status else ""
            sample.outcome, sample.problem = "error", status + reply.problem
            return
        broken = stream.broken(self.settings.output_tokens)
        if reply.left and not stream.failed:
            sample.outcome = "left"
        elif reply.problem:
            sample.outcome, sample.problem = "lost", reply.problem
            return
        elif broken is not None:
            sample.outcome = "wrong" if broken.wrong else "lost"
            sample.problem = broken.told
            return
        else:
            sample.outcome = "right"
        prompt = msgspec.json.encode(ask.messages)
        differs = self.answers.differs(prompt, stream.text, whole=sample.outcome == "right")
        if differs:
            sample.outcome, sample.problem = "wrong", differs

    def _keep(self, sample: Sample) -> None:
        self.samples.append(sample)
        kind = sample.kind
        if sample.outcome == "refused":
            self._fire("HTTP", "429", (sample.end_s - sample.sent_s) * 1e3, 0, "")
            return
        if sample.ttft_s is not None:
            self._fire("TTFT", kind, sample.ttft_s * 1e3, 0, "")
        for gap_s in sample.gaps_s:
            self._fire("ITL", kind, gap_s * 1e3, 0, "")
        # Locust keeps one line for each text of a failure: what varies is in the report.
        failure = sample.outcome if sample.outcome in FAILURES else ""
        self._fire("E2E", kind, (sample.end_s - sample.sent_s) * 1e3, sample.tokens, failure)

    def _body(self, ask: Ask) -> bytes:
        return msgspec.json.encode(
            {
                "model": self.model,
                "messages": ask.messages,
                "max_tokens": self.settings.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


def capacity_rps(spans: list[Span], samples: list[Sample], output_tokens: int) -> float:
    """By the tokens that came in the best half of the measurement: what was slow at its beginning,
    when all clients did the same, or for another reason, does not count."""
    span = next(span for span in spans if span.phase.name == CAPACITY)
    window_s = (span.end_s - span.begin_s) / 2
    times_s, tokens = token_events(samples)
    best = 0.0
    for step in range(WINDOWS):
        begin_s = span.begin_s + window_s * step / (WINDOWS - 1)
        inside = (times_s >= begin_s) & (times_s < begin_s + window_s)
        best = max(best, float(tokens[inside].sum()))
    return best / output_tokens / window_s
