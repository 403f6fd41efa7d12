"""The queue: in order, onto workers, by what is true now."""

import random

import pytest

from scheduler.rig import WORKING, node, submit
from slipstream.core.machine import Effect, Send
from slipstream.errors import ErrorCode
from slipstream.messages import Decode, Hello, NodeInfo, Prefill
from slipstream.scheduler.dispatcher import Dispatcher
from slipstream.scheduler.fleet import Fleet
from slipstream.scheduler.policy import Disaggregation, Rules
from slipstream.scheduler.request import Request, State


class Desk:
    def __init__(self, *nodes: NodeInfo, mode: Disaggregation = "always"):
        self.fleet = Fleet()
        self.dispatcher = Dispatcher(self.fleet, Rules("cost", mode))
        for info in nodes or [node(node_id, epoch=5) for node_id in WORKING]:
            self.hello(info)
        self.live: list[Request] = []

    def hello(self, info: NodeInfo) -> None:
        self.fleet.hello(info.node_id, Hello(node=info))
        self.dispatcher.sync(0.0)

    def add(self, request_id: str, migrations: int = 0, **fields: object) -> Request:
        message = submit(request_id, **fields)  # type: ignore[arg-type]
        request = Request(message, "tokenizer-0", 100.0, message.attempt, State.LOCATING)
        request.migrations = migrations
        self.live.append(request)
        self.dispatcher.enqueue(request, 0.0)
        return request

    def dispatch(self, now_s: float = 0.0) -> list[Effect]:
        return self.dispatcher.dispatch(now_s)

    def end(self, request: Request) -> None:
        self.dispatcher.take_back(request, 0.0)
        self.live.remove(request)

    @property
    def queued(self) -> list[str]:
        return [request.request_id for request in self.dispatcher.lane("fake").queue]


def said(effects: list[Effect]) -> list[tuple[str, Decode | Prefill]]:
    messages = [(send.to, send.message) for send in effects if isinstance(send, Send)]
    assert len(messages) == len(effects)
    return messages  # type: ignore[return-value]


def test_a_pair_is_told_the_reader_first() -> None:
    desk = Desk()
    request = desk.add("r", prompt=40, accepted=2, attempt=3)
    request.hints = {"prefill-0": 2, "decode-0": 1}
    (to, decode), (source, prefill) = said(desk.dispatch(now_s=30.0))
    assert isinstance(decode, Decode) and isinstance(prefill, Prefill)
    assert (to, source) == ("decode-0", "prefill-0")
    assert (decode.prefill, decode.prefill_epoch, prefill.decode) == ("prefill-0", 5, "decode-0")
    assert (decode.claimed_blocks, prefill.claimed_blocks) == (0, 2), "for who looks for them"
    for message in (decode, prefill):
        assert (message.attempt, message.tokenizer, message.timeout_s) == (3, "tokenizer-0", 70.0)
        assert (len(message.prompt), len(message.accepted)) == (160, 8)
    assert (request.state, request.workers) == (State.PREFILLING, {"prefill-0", "decode-0"})
    assert desk.queued == [] and desk.dispatcher.placed["apart"] == 1
    assert desk.dispatcher.waited_s == 30.0


def test_one_worker_is_told_that_it_is_alone() -> None:
    desk = Desk(mode="never")
    request = desk.add("r")
    request.hints = {"decode-0": 1}
    ((to, decode),) = said(desk.dispatch(now_s=99.0))
    assert isinstance(decode, Decode) and to == "decode-0"
    assert (decode.prefill, decode.prefill_epoch, decode.claimed_blocks) == (None, 0, 1)
    assert decode.timeout_s == 1.0
    assert (request.state, request.workers) == (State.DECODING, {"decode-0"})
    assert desk.dispatcher.placed["alone"] == 1


def test_nothing_is_begun_after_its_time() -> None:
    desk = Desk(mode="never")
    late, next_one = desk.add("late"), desk.add("next", timeout_s=200.0)
    next_one.deadline_s = 200.0
    desk.dispatch(now_s=100.0)
    ((turned_away, problem),) = desk.dispatcher.late
    assert turned_away is late and problem.code is ErrorCode.DEADLINE
    assert desk.queued == [] and next_one.state is State.DECODING


def test_what_was_given_counts_at_once() -> None:
    desk = Desk(*(node(f"{role}-{n}") for role in ("prefill", "decode") for n in (0, 1)))
    first, second = desk.add("a"), desk.add("b")
    desk.dispatch()
    assert not first.workers & second.workers


def test_what_is_cached_at_its_worker_is_no_load_there() -> None:
    desk = Desk(*(node(f"{role}-{n}") for role in ("prefill", "decode") for n in (0, 1)))
    desk.add("a", prompt=100).hints = {"prefill-0": 6}
    desk.add("b", prompt=20)
    desk.dispatch()
    third = desk.add("c", prompt=20)
    desk.dispatch()
    assert third.prefill == "prefill-0", "4 tokens wait there, 20 at the other"


def test_nobody_overtakes() -> None:
    desk = Desk()
    running = desk.add("running", prompt=100)
    desk.dispatch()
    large, small = desk.add("large", prompt=200), desk.add("small", prompt=1)
    assert desk.dispatch() == [] and desk.queued == ["large", "small"]
    desk.end(running)
    desk.dispatch()
    assert large.state is State.PREFILLING and small.state is State.PREFILLING


def test_of_those_that_wait_the_lowest_number_goes_first() -> None:
    desk = Desk(node("tokenizer-0"))
    desk.add("first")
    desk.add("later", priority=5)
    desk.add("second")
    desk.add("begun", migrations=1, priority=9)
    desk.add("urgent", priority=-1)
    desk.add("also urgent", priority=-1)
    order = ["begun", "urgent", "also urgent", "first", "second", "later"]
    assert desk.dispatch() == [] and desk.queued == order


@pytest.mark.parametrize("begun", [{"accepted": 1}, {"migrations": 1}])
def test_what_has_begun_goes_first(begun: dict[str, int]) -> None:
    desk = Desk(node("tokenizer-0"))
    desk.add("a")
    desk.add("begun", **begun)
    assert desk.dispatch() == [] and desk.queued == ["begun", "a"]


def test_a_finished_stream_makes_room_before_it_is_acknowledged() -> None:
    desk = Desk(node("decode-0", max_num_seqs=1))
    first = desk.add("a")
    desk.dispatch()
    second = desk.add("b")
    assert desk.dispatch() == []
    desk.dispatcher.take_back(first, 0.0)
    desk.dispatch()
    assert second.state is State.DECODING


def test_who_drains_gets_nothing_and_is_no_reason_to_stumble() -> None:
    desk = Desk()
    desk.add("a")
    desk.dispatch()
    for worker in ("prefill-0", "decode-0"):
        desk.hello(node(worker, epoch=5, draining=True))
    waits = desk.add("b")
    assert desk.dispatch() == [] and waits.state is State.QUEUED


def test_who_was_removed_is_not_placed() -> None:
    desk = Desk()
    desk.dispatcher.remove(desk.add("r"))
    desk.dispatcher.remove(desk.live[0])
    assert desk.dispatch() == []


def test_a_worker_that_is_too_small_for_the_longest_answer_gets_none() -> None:
    desk = Desk(node("decode-0", max_num_seqs=1), mode="never")
    desk.add("runs", max_tokens=200)
    desk.add("long", max_tokens=200)
    desk.add("short")
    desk.dispatch()
    desk.hello(node("decode-1", num_blocks=4, max_num_seqs=1))
    desk.hello(node("decode-2", max_model_len=64, max_num_seqs=1))
    [(to, message)] = said(desk.dispatch())
    assert message.request_id == "short" and to != "decode-0", "it needs no large worker"
    for number in range(3):
        desk.add(f"short-{number}")
    assert [to for to, _ in said(desk.dispatch())] == [{"decode-1": "decode-2"}.get(to, "decode-1")]
    assert desk.queued == ["long", "short-1", "short-2"]
    desk.end(desk.live[0])
    placed = {message.request_id: to for to, message in said(desk.dispatch())}
    assert placed == {"long": "decode-0"}, "nobody overtakes"


@pytest.mark.parametrize("seed", range(20))
def test_drawn_queues_are_placed_in_order_and_within_what_workers_hold(seed: int) -> None:
    draw = random.Random(seed)
    names = [*(f"prefill-{n}" for n in range(2)), *(f"decode-{n}" for n in range(3))]
    desk = Desk(
        *(node(name, num_blocks=draw.choice((8, 20)), max_num_seqs=3) for name in names),
        mode=draw.choice(("auto", "always", "never")),
    )
    waiting: list[str] = []
    for number in range(60):
        waiting.append(f"r{number}")
        desk.add(f"r{number}", prompt=draw.randrange(1, 108))
        placed = [message.request_id for _, message in said(desk.dispatch())]
        order = list(dict.fromkeys(placed))
        assert order == waiting[: len(order)]
        del waiting[: len(order)]
        assert desk.queued == waiting
        for info in desk.fleet.workers("fake"):
            held = [request for request in desk.live if info.node_id in request.workers]
            blocks = sum(request.num_blocks for request in held)
            assert info.worker is not None and len(held) <= 3
            assert len(held) == 1 or blocks <= info.worker.num_blocks
        for request in list(desk.live):
            if request.workers and draw.random() < 0.3:
                desk.end(request)
