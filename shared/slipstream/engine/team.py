"""Rank 0's view of the other ranks of its worker: processes that it starts, which have the same
model's other heads, a pool of their own with the same blocks, and transports of their own."""

import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from xxhash import xxh3_128_digest

from slipstream.config import WorkerConfig
from slipstream.core.machine import BlocksDigested, DigestBlocks, Event, PullBlocks, PullDone
from slipstream.engine.batch import Sizes
from slipstream.engine.ranks import Ranks
from slipstream.engine.team_wire import (
    Begin,
    Digest,
    Digested,
    FromRank,
    MakePool,
    Peers,
    Pull,
    Pulled,
    Ready,
    Refused,
    Room,
    Step,
    Wire,
)
from slipstream.engine.transfers import Transfers
from slipstream.errors import ExitCode
from slipstream.messages import NodeInfo
from slipstream.types import BlockId, Epoch, NodeId

DIGEST_TIMEOUT_S = 60.0
"""A rank that takes longer has hung; the step fails."""
END_TIMEOUT_S = 10.0

_Said = TypeVar("_Said", Room, Ready)


class Team:
    """The ranks above 0. Any thread."""

    def __init__(
        self,
        config: WorkerConfig,
        epoch: Epoch,
        device: torch.device,
        lost: Callable[[str, int], None],
    ) -> None:
        """Starts them, and joins them. `lost`: told why the worker has to end, and its exit code;
        does not return. RuntimeError: somebody did not come."""
        self._who, self._lost, self._closing = f"slipstream {config.role}", lost, False
        self._said: dict[int, queue.SimpleQueue[FromRank]] = {}
        self._waiting: dict[tuple[str, int], Future[PullDone | BlocksDigested]] = {}
        self._lock, self._ids = threading.Lock(), itertools.count(1)
        meeting = Path(config.run_dir) / f"{config.node_id}-{epoch}.ranks"
        self._ranks: list[_Rank] = []
        for rank in range(1, config.tensor_parallel_size):
            self._said[rank] = queue.SimpleQueue()
            self._ranks.append(_Rank(rank, self._heard, self._gone))
            settings = msgspec.to_builtins(config)
            order = Begin(settings, config.role, rank, epoch, str(meeting))
            self._ranks[-1].wire.send(order)
        self.ranks = Ranks(config.tensor_parallel_size, 0, meeting, device)
        meeting.unlink(missing_ok=True)

    def least_room(self, num_bytes: int) -> int:
        """Of `num_bytes`, which rank 0 has, and of what the others have: when they have loaded."""
        return min([num_bytes, *(self._next(each, Room).num_bytes for each in self._ranks)])

    def make_pools(self, num_blocks: int) -> tuple[dict[str, str], ...]:
        """How peers reach each rank's."""
        for each in self._ranks:
            each.wire.send(MakePool(num_blocks))
        return tuple(self._next(each, Ready).transports for each in self._ranks)

    def tell(self, sizes: Sizes) -> None:
        """They take part in the next batch: it follows by `ranks`."""
        for each in self._ranks:
            each.wire.send(Step(sizes))

    def digests(self, own: Sequence[bytes], blocks: Sequence[BlockId]) -> tuple[bytes, ...]:
        """Of whole blocks; `own`: of rank 0's parts. RuntimeError: they cannot be made."""
        if not blocks:
            return ()
        op_id = f"step/{next(self._ids)}"
        asked = self.digest(DigestBlocks(op_id, tuple(blocks)))
        return joined([own, *(_digests_of(each.result(DIGEST_TIMEOUT_S)) for each in asked)])

    def digest(self, effect: DigestBlocks) -> list["Future[PullDone | BlocksDigested]"]:
        """Of each rank's parts."""
        return [self._ask(each, effect.op_id, Digest(effect)) for each in self._ranks]

    def pull(
        self, effect: PullBlocks, peer: NodeInfo | None
    ) -> list["Future[PullDone | BlocksDigested]"]:
        """Each rank's part of a READ."""
        return [
            self._ask(each, effect.pull_id, Pull(effect, peer and as_seen_by(each.number, peer)))
            for each in self._ranks
        ]

    def meet(self, nodes: Sequence[NodeInfo]) -> None:
        for each in self._ranks:
            each.wire.send(Peers(tuple(as_seen_by(each.number, node) for node in nodes)))

    def close(self) -> None:
        """They end when they are left alone."""
        self._closing = True
        for each in self._ranks:
            each.close()

    def _ask(
        self, rank: "_Rank", name: str, message: Pull | Digest
    ) -> "Future[PullDone | BlocksDigested]":
        future: Future[PullDone | BlocksDigested] = Future()
        with self._lock:
            self._waiting[name, rank.number] = future
        try:
            rank.wire.send(message)
        except OSError:
            self._gone(rank.number)
        return future

    def _heard(self, rank: int, message: FromRank) -> None:
        match message:
            case Refused(line, code):
                self._lost(line, code)
            case Pulled(event):
                self._answered(event.pull_id, rank, event)
            case Digested(event):
                self._answered(event.op_id, rank, event)
            case _:
                self._said[rank].put(message)

    def _answered(self, name: str, rank: int, event: PullDone | BlocksDigested) -> None:
        with self._lock:
            future = self._waiting.pop((name, rank))
        future.set_result(event)

    def _gone(self, rank: int) -> None:
        if not self._closing:
            self._lost(f"{self._who}: rank {rank} is gone, and with it this worker", ExitCode.FAULT)

    def _next(self, rank: "_Rank", kind: type[_Said]) -> _Said:
        message = self._said[rank.number].get()
        assert isinstance(message, kind), message
        return message


class _Rank:
    """One other process, and a thread that hears it."""

    def __init__(
        self, number: int, heard: Callable[[int, FromRank], None], gone: Callable[[int], None]
    ) -> None:
        ours, theirs = socket.socketpair()
        self.number, self._heard, self._gone = number, heard, gone
        self._connection = ours
        self.wire = Wire(ours, FromRank)
        with theirs:
            # In a session of its own: a signal of the terminal is for rank 0, which says what ends.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "slipstream.engine.follower", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        threading.Thread(target=self._hear, name=f"rank-{number}", daemon=True).start()

    def _hear(self) -> None:
        while (message := self.wire.receive()) is not None:
            self._heard(self.number, message)
        self._gone(self.number)

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class TeamTransfers:
    """As `Transfers`, of all ranks: an effect has ended when each has done its part, and blocks
    have one digest, of those of their parts."""

    def __init__(
        self,
        transfers: Transfers,
        team: Team,
        directory: Callable[[], Mapping[NodeId, NodeInfo]],
    ) -> None:
        self._own, self._team, self._directory = transfers, team, directory
        self._asked: dict[str, _Gathering] = {}
        self._met: tuple[NodeInfo, ...] = ()
        self._post: Callable[[Event], None] = lambda event: None

    def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._own.start(self._ended)

    def execute(self, effect: PullBlocks | DigestBlocks) -> None:
        self._introduce()
        if isinstance(effect, PullBlocks):
            name, peer = effect.pull_id, self._directory().get(effect.peer)
            asked = self._team.pull(effect, peer)
        else:
            name, asked = effect.op_id, self._team.digest(effect)
        gathering = self._asked[name] = _Gathering(1 + len(asked), self._post)
        for rank, each in enumerate(asked, 1):
            each.add_done_callback(lambda done, rank=rank: gathering.put(rank, done.result()))  # type: ignore[misc]
        self._own.execute(effect)

    async def close(self) -> None:
        await self._own.close()

    def statistics(self) -> dict[str, float]:
        """Of rank 0's parts."""
        return self._own.statistics()

    def _introduce(self) -> None:
        nodes = tuple(self._directory().values())
        if nodes != self._met:
            self._met = nodes
            self._team.meet(nodes)

    def _ended(self, event: Event) -> None:
        """Any thread."""
        assert isinstance(event, PullDone | BlocksDigested)
        name = event.pull_id if isinstance(event, PullDone) else event.op_id
        self._asked.pop(name).put(0, event)


class _Gathering:
    """Ends of one effect, in whatever order the ranks come to theirs; nobody waits for them."""

    def __init__(self, count: int, post: Callable[[Event], None]) -> None:
        self._ends: list[PullDone | BlocksDigested | None] = [None] * count
        self._post, self._lock = post, threading.Lock()

    def put(self, rank: int, end: PullDone | BlocksDigested) -> None:
        with self._lock:
            self._ends[rank] = end
            ends = [each for each in self._ends if each is not None]
        if len(ends) == len(self._ends):
            self._post(combined(ends))


def combined(events: Sequence[PullDone | BlocksDigested]) -> PullDone | BlocksDigested:
    """What the ranks' ends come to: each rank has one part of every block."""
    first, failed = events[0], [event for event in events if _failed(event)]
    if failed:
        return failed[0]
    digests = joined([_digests_of(event) for event in events])
    if isinstance(first, BlocksDigested):
        return msgspec.structs.replace(first, digests=digests)
    elapsed_s = max(event.elapsed_s for event in events if isinstance(event, PullDone))
    return msgspec.structs.replace(first, digests=digests, elapsed_s=elapsed_s)


def joined(parts: Sequence[Sequence[bytes]]) -> tuple[bytes, ...]:
    """Digests of whole blocks, from those of each rank's parts."""
    return tuple(xxh3_128_digest(b"".join(each)) for each in zip(*parts, strict=True))


def _failed(event: PullDone | BlocksDigested) -> bool:
    return event.error is not None if isinstance(event, PullDone) else event.digests is None


def _digests_of(event: PullDone | BlocksDigested) -> tuple[bytes, ...]:
    if event.digests is None:
        raise RuntimeError("a rank could not make digests")
    return event.digests


def as_seen_by(rank: int, node: NodeInfo) -> NodeInfo:
    """The peer as a rank of ours reaches it: the same rank of that worker."""
    if node.worker is None:
        return node
    there = node.worker.rank_transports
    transports = there[rank - 1] if rank <= len(there) else {}
    worker = msgspec.structs.replace(node.worker, transports=transports)
    return msgspec.structs.replace(node, worker=worker)


def end_worker(line: str, code: int) -> None:
    """The last word of a worker that has lost a rank: nothing of it can go on."""
    print(line, file=sys.stderr, flush=True)
    os._exit(code)
