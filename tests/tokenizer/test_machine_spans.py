"""However spans arrive, the client's text is that of all tokens decoded at once."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.core.machine import PeerDown, PeerUp
from slipstream.messages import (
    SCHEDULER,
    Resume,
    StreamEnded,
    Submit,
    TextDelta,
    TextOut,
)
from slipstream.tokenizer.detokenizer import Detokenizer
from slipstream.types import FinishReason, unpack_tokens
from tokenizer.machines import EOS, ByteCodec, Rig, span, submission

PROMPT = "Hi"
WORKERS = ["decode-0", "decode-1"]

texts = st.text(alphabet="ab ENDé你😀", max_size=20).map(lambda text: list(text.encode()))
raw = st.lists(st.integers(0, 255), max_size=20)
operations = st.one_of(
    st.tuples(st.just("span"), st.integers(-1, 1), st.floats(0, 1), st.integers(0, 8)),
    st.tuples(st.sampled_from(["resume", "resync", "lost", "moved", "tick"])),
)


class Client:
    """A frontend's rule: what follows on what is there."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.last: TextDelta | None = None
        self.attempt = 1

    def take(self, delta: TextDelta) -> None:
        if delta.position == len(self.tokens) and delta.attempt >= self.attempt and not self.last:
            self.tokens += unpack_tokens(delta.tokens)
            self.text += delta.text
            self.last = delta if delta.finish_reason else None


class Run:
    def __init__(self, answer: list[int], sampling: dict[str, object], reason: FinishReason):
        self.answer, self.reason = answer, reason
        self.sampling = sampling
        self.rig = Rig()
        self.client = Client()
        self.attempt = 1
        self.ended = False
        self.rig.ask(self._submission())

    def _submission(self) -> object:
        return submission(
            prompt=PROMPT,
            accepted=self.client.tokens,
            attempt=self.client.attempt,
            **self.sampling,
        )

    def listen(self, *, deaf: bool = False) -> None:
        for submit in self.rig.all(Submit):
            assert submit.attempt >= self.attempt
            self.attempt = submit.attempt
            known = unpack_tokens(submit.accepted)
            assert known == self.answer[: len(known)]
        for out in self.rig.all(TextOut, "frontend-0"):
            for delta in out.deltas:
                if not deaf:
                    self.client.take(delta)
        self.ended |= bool(self.rig.all(StreamEnded))

    def span(self, attempt: int, start: int, length: int, worker: str = "decode-0") -> None:
        tokens = self.answer[start : start + length]
        at_end = start + length >= len(self.answer)
        stop = self.answer[-1] if self.reason is FinishReason.STOP else None
        if attempt < self.attempt:
            tokens = [ord("?")] * len(tokens)  # void, so it may say anything
        made = span(
            tokens,
            start,
            attempt=attempt,
            finish=self.reason if at_end else None,
            stop_token=stop if at_end else None,
        )
        self.rig.spans(made, worker=worker)
        self.listen()

    def apply(self, operation: tuple[object, ...]) -> None:
        match operation:
            case ("span", int(older), float(where), int(length)):
                start = round(where * (len(self.answer) - 1))
                self.span(self.attempt + older, start, length, WORKERS[start % 2])
            case ("resume",):
                self.rig.hear(SCHEDULER, Resume(request_id="r", attempt=self.attempt + 1))
                self.listen()
            case ("lost",):
                self.span_lost()
            case ("resync",):
                self.resync()
            case ("moved",) if not self.client.last:  # away, and back again
                self.client.attempt = self.attempt = self.attempt // 1024 * 1024 + 1024
                self.ended = False
                self.resync()
            case ("tick",):
                self.rig.pass_time(1.0)

    def span_lost(self) -> None:
        """Something is said to a frontend that does not hear it."""
        if not self.ended and not self.client.last:
            have = len(self.client.tokens)
            self.rig.handle(PeerDown("frontend-0"))
            self.rig.spans(span(self.answer[have : have + 2], have, attempt=self.attempt))
            self.listen(deaf=True)
            self.rig.handle(PeerUp("frontend-0", 1))
            self.resync()

    def resync(self) -> None:
        if not self.client.last:
            self.rig.ask(self._submission())  # type: ignore[arg-type]
            self.listen()


def expected(
    answer: list[int], sampling: dict[str, object], stops: bool
) -> tuple[str, int, object]:
    stop = sampling.get("stop", ())
    minimum = sampling.get("min_tokens", 0)
    assert isinstance(stop, list) and isinstance(minimum, int)
    whole = Detokenizer(ByteCodec(), PROMPT.encode(), tuple(stop), min_tokens=minimum)
    text = ""
    for count, token in enumerate(answer, 1):
        if not (stops and count == len(answer)):
            text += whole.push(token)
        if whole.stopped is not None:
            return text, count, whole.stopped
    text += whole.flush()
    return text, len(answer), whole.stopped


@settings(max_examples=300, deadline=None)
@given(
    body=texts | raw,
    eos=st.booleans(),
    stop=st.lists(st.sampled_from(["END", "ND", "a b", "é"]), max_size=2, unique=True),
    minimum=st.integers(0, 6),
    schedule=st.lists(operations, max_size=12),
)
@example(
    body=list(b"abEND"),
    eos=False,
    stop=["END"],
    minimum=0,
    schedule=[("span", 0, 0.0, 4), ("moved",), ("lost",)],
)
def test_text_does_not_depend_on_the_schedule(
    body: list[int],
    eos: bool,
    stop: list[str],
    minimum: int,
    schedule: list[tuple[object, ...]],
) -> None:
    eos = eos and len(body) >= minimum  # no worker would end it sooner
    answer = [*body, EOS] if eos else [*body, ord(".")]
    sampling: dict[str, object] = {
        "max_tokens": len(answer) + eos,
        "stop": stop,
        "min_tokens": min(minimum, len(answer)),
    }
    run = Run(answer, sampling, FinishReason.STOP if eos else FinishReason.LENGTH)
    for operation in schedule:
        run.apply(operation)
    for _ in range(2 * len(answer) + 4):
        if run.client.last:
            break
        run.span(run.attempt, len(run.client.tokens), 2)
        run.resync()
    text, count, stopped = expected(answer, sampling, eos)
    assert run.client.last is not None
    assert run.client.text == text
    assert run.client.tokens == answer[:count]
    assert run.client.last.stop_reason == stopped
    assert run.client.last.usage is not None
    assert run.client.last.usage.completion_tokens == count
    assert run.ended
