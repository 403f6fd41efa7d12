"""Both machines together, without a bus: whatever breaks, every answer is whole."""

import pytest

from frontend.wired import FRONTEND, TOKENIZERS, WORKER, World
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import SCHEDULER, TextDelta
from slipstream.types import FinishReason
from tokenizer.machines import submission

TEXTS = ["Hello, wörld 你好 😀, how are you?", "x", "stop here END and not here", "é" * 30]


def expected(text: str) -> str:
    return text.partition("END")[0]


def test_one_answer() -> None:
    world = World(1)
    answer = world.open(submission("r", "Hi|" + TEXTS[0]))
    world.run(5.0)
    assert answer.text == TEXTS[0]
    assert answer.prompt_tokens == [len(("Hi|" + TEXTS[0]).encode())]
    assert isinstance(answer.last, TextDelta)
    assert answer.last.finish_reason is FinishReason.STOP
    world.close("r")
    world.run(1.0)
    assert not world.cluster.running and not world.cluster.log
    assert world.frontend.statistics()["requests_unclosed"] == 0


def fault(world: World) -> None:
    kind = world.chance.choice(["cut", "cut", "cut", "crash", "scheduler", "worker", "pause"])
    tokenizer = world.chance.choice(TOKENIZERS)
    if kind == "cut":
        world.cut(tokenizer, world.chance.choice([FRONTEND, FRONTEND, WORKER, SCHEDULER]))
    elif kind == "crash":
        world.crash(tokenizer)
    elif kind == "scheduler":
        world.forget_requests()
    elif kind == "worker" and world.cluster.running:
        world.cluster.lose_worker(world.chance.choice(sorted(world.cluster.running)))


@pytest.mark.parametrize("seed", range(120))
def test_every_answer_is_whole(seed: int) -> None:
    world = World(seed)
    wanted = {}
    for i in range(6):
        wanted[f"r{i}"] = world.chance.choice(TEXTS)
    closed = set()
    for request_id, text in wanted.items():
        answer = world.open(submission(request_id, "Hi|" + text, stop=["END"], timeout_s=500.0))
        if isinstance(answer.last, Problem):  # both tokenizers have just gone: nothing was begun
            assert answer.last.code is ErrorCode.NOT_READY
            closed.add(request_id)
        for _ in range(world.chance.randint(0, 3)):
            world.run(world.chance.choice([0.05, 0.1, 0.3]))
            fault(world)
        if world.chance.random() < 0.2:
            closed.add(request_id)
            world.close(request_id)
    world.run(60.0)
    for request_id in wanted.keys() - closed:
        answer = world.answers[request_id]
        assert isinstance(answer.last, TextDelta), f"{request_id}: {answer}"
        assert answer.text == expected(wanted[request_id])
        assert len(answer.prompt_tokens) == 1
        world.close(request_id)
    world.run(30.0)
    assert not world.cluster.running
    for name in TOKENIZERS:
        statistics = world.tokenizers[name].statistics()
        assert statistics["streams_live"] == statistics["streams_ended"] == 0
