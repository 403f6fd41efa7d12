"""One process of a toy cluster: `peer.py KIND CONFIG_JSON`, with a machine that fits on a page.

Tests look into its recording, which tells what it saw and in which order.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec

from slipstream.config import ServiceConfig, StartError
from slipstream.core.machine import (
    Closed,
    Drain,
    Effect,
    EncodePrompt,
    Event,
    Exit,
    Note,
    PeerDown,
    PeerUp,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.core.membership import Membership
from slipstream.errors import ErrorCode, ExitCode, Problem
from slipstream.messages import Failed, Hello, NodeInfo, Peers, StreamEnded, TextPrompt
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.shell import Executor, run_service
from slipstream.types import NodeId, Role

WINDOW = 1000
POSTS = 50
THREADS = 4


class EchoConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: ClassVar[Role] = Role.SCHEDULER


class AskerConfig(ServiceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: ClassVar[Role] = Role.FRONTEND

    questions: int = 0
    drain_s: float = 0.0
    """How long it takes to drain; negative: for ever."""
    executor: str = ""


class Echo:
    """The scheduler of the toy cluster: introduces its peers to each other, answers questions."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, NodeInfo] = {}
        self.answered = 0

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]:
        match event:
            case Received(source, Hello() as hello):
                self.nodes[source] = hello.node
                peers = Peers(nodes=list(self.nodes.values()), ready=True)
                return [Send(node, peers) for node in self.nodes]
            case Received(source, StreamEnded() as question):
                self.answered += 1
                return [Send(source, answer(question.request_id))]
            case Drain():
                return [Note("100 % done"), Exit()]
        return []

    def statistics(self) -> dict[str, float]:
        return {"answered_total": self.answered}

    def check(self) -> None:
        pass


class Asker:
    """Asks the scheduler `questions` things, `WINDOW` at a time; fails if an answer is not next."""

    def __init__(self, node: NodeInfo, config: AskerConfig) -> None:
        self.membership = Membership(node)
        self.config = config
        self.asked = self.answers = 0
        self.posted: list[str] = []
        self.ready = config.executor != "unready"
        self.reason = "was told so"

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]:
        return [*self.membership.handle(event, now_s), *self._own(event, now_s)]

    def _own(self, event: Event, now_s: float) -> Sequence[Effect]:
        match event:
            case Started():
                tick: list[Effect] = [SetTimer("tick", now_s + 0.05)]
                if self.config.executor:
                    tick.append(EncodePrompt("e", TextPrompt(text="secret words")))
                return tick
            case TimerFired("tick"):
                return [SetTimer("tick", now_s + 0.05)]
            case PeerUp("scheduler", _):
                return self._ask()
            case PeerDown("scheduler"):
                self.asked = self.answers
            case Received("scheduler", Failed(request_id=text)):
                if text == "bug":
                    raise RuntimeError("planted")
                assert text == str(self.answers), f"{text} came instead of {self.answers}"
                self.answers += 1
                return self._ask()
            case Closed(request_id):
                self.posted.append(request_id)
            case Drain():
                self.membership.drain(now_s)
                if self.config.drain_s == 0:
                    return [Exit()]
                if self.config.drain_s > 0:
                    return [SetTimer("drained", now_s + self.config.drain_s)]
            case TimerFired("drained"):
                return [Exit()]
        return []

    def _ask(self) -> list[Effect]:
        until = min(self.config.questions, self.answers + WINDOW)
        questions = [StreamEnded(request_id=str(i)) for i in range(self.asked, until)]
        self.asked = until
        return [Send("scheduler", question) for question in questions]

    def statistics(self) -> dict[str, float]:
        return {"answers_total": self.answers, "asked": self.asked, "posted": len(self.posted)}

    def check(self) -> None:
        pass


def answer(text: str) -> Failed:
    return Failed(request_id=text, problem=Problem(code=ErrorCode.INTERNAL, message="x"))


class Hands:
    """An executor of every kind that a test may want."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.post: Callable[[Event], None] = lambda event: None

    async def start(self, post: Callable[[Event], None]) -> None:
        self.post = post
        if self.kind == "refuses":
            raise StartError("slipstream asker: no such luck", ExitCode.MODEL)
        if self.kind == "slow":
            await asyncio.sleep(3600)

    def execute(self, effect: Effect) -> None:
        if self.kind == "fails":
            raise RuntimeError("planted")
        if self.kind == "hangs":
            threading.Thread(target=time.sleep, args=(3600,)).start()
        for thread in range(THREADS):
            threading.Thread(target=self._post_many, args=(thread,)).start()

    def _post_many(self, thread: int) -> None:
        for number in range(POSTS):
            self.post(Closed(f"{thread}-{number}"))

    def statistics(self) -> dict[str, float]:
        return {"hands": 2}

    async def close(self) -> None:
        print("closed", flush=True)


def main(kind: str, raw: str) -> int:
    config: Any = msgspec.json.decode(raw, type=EchoConfig if kind == "echo" else AskerConfig)
    node = NodeInfo(
        node_id=config.node_id,
        role=config.role,
        epoch=new_epoch(config),
        address=config.advertise,
        host=host_identity(),
    )
    machine = Echo() if kind == "echo" else Asker(node, config)
    wanted = getattr(config, "executor", "")
    executor: Executor | None = Hands(wanted) if wanted not in ("", "none") else None
    try:
        return run_service(config, node, machine, executor, drain_timeout_s=1.0)
    except StartError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
