"""A rank of a worker above 0. Rank 0 schedules, samples and speaks on the bus; this one computes
its part of each batch and moves its part of each block.

    python -m slipstream.engine.follower FD
"""

import asyncio
import os
import queue
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import msgspec

from slipstream.config import StartError, WorkerConfig
from slipstream.core.machine import BlocksDigested, Event, PullDone
from slipstream.engine.model_config import ModelError, ServedModel
from slipstream.engine.models import read_model
from slipstream.engine.ranks import Ranks
from slipstream.engine.runner import Runner
from slipstream.engine.team_wire import (
    Begin,
    Digest,
    Digested,
    MakePool,
    Peers,
    Pull,
    Pulled,
    Ready,
    Refused,
    Room,
    Step,
    ToRank,
    Wire,
)
from slipstream.engine.transfers import Transfers
from slipstream.engine.worker_parts import (
    WorkerPlan,
    load_runner,
    make_pool,
    make_transports,
    plan_of,
    pool_tensor,
    room_of,
)
from slipstream.errors import ExitCode
from slipstream.messages import NodeInfo
from slipstream.runtime.log import set_up
from slipstream.types import NodeId, Role


class _Prefill(WorkerConfig, frozen=True, kw_only=True):
    role: ClassVar[Role] = Role.PREFILL


class _Decode(WorkerConfig, frozen=True, kw_only=True):
    role: ClassVar[Role] = Role.DECODE


class Follower:
    """Hears rank 0 on one thread, computes on another, moves blocks beside them."""

    def __init__(self, begin: Begin, wire: Wire) -> None:
        """StartError, ModelError: as of any worker."""
        kind = _Prefill if begin.role is Role.PREFILL else _Decode
        config = msgspec.convert(begin.settings, kind)
        name = f"{config.node_id}.r{begin.rank}"
        self._config: WorkerConfig = msgspec.structs.replace(config, node_id=name)
        set_up(config.log_level, name, config.log_json)
        self._begin, self._wire = begin, wire
        self._plan: WorkerPlan = plan_of(self._config, _model(config), begin.rank)
        device = self._plan.device
        ranks = Ranks(config.tensor_parallel_size, begin.rank, Path(begin.meeting), device)
        self._runner: Runner = load_runner(self._config, self._plan, device, ranks)
        self._steps = queue.SimpleQueue[Step]()
        self._peers: dict[NodeId, NodeInfo] = {}

    async def run(self) -> None:
        """Until rank 0 is gone."""
        loop = asyncio.get_running_loop()
        room = room_of(self._config, self._plan, self._runner)
        self._wire.send(Room(room.num_bytes))
        make = await asyncio.to_thread(self._wire.receive)
        if not isinstance(make, MakePool):
            return
        with ExitStack() as stack:
            epoch = self._begin.epoch
            segment = make_pool(self._config, self._plan, epoch, make.num_blocks)
            stack.callback(segment.close)
            self._runner.attach(pool_tensor(self._plan, segment))
            prepared = asyncio.to_thread(self._runner.prepare, self._config.max_num_seqs)
            transports = make_transports(self._config, segment)
            stack.callback(transports.close)
            transfers = Transfers(segment.blocks, transports, lambda: self._peers)
            transfers.start(self._post)
            self._wire.send(Ready(transports.advertise()))
            await prepared  # together with rank 0
            threading.Thread(target=self._compute, name="compute", daemon=True).start()
            await asyncio.to_thread(self._hear, loop, transfers)
            await transfers.close()

    def _hear(self, loop: asyncio.AbstractEventLoop, transfers: Transfers) -> None:
        message: ToRank | None
        while (message := self._wire.receive()) is not None:
            match message:
                case Step():
                    self._steps.put(message)
                case Peers(nodes):
                    self._peers = {node.node_id: node for node in nodes}
                case Pull(effect, peer):
                    if peer is not None:
                        self._peers = {**self._peers, peer.node_id: peer}
                    loop.call_soon_threadsafe(transfers.execute, effect)
                case Digest(effect):
                    loop.call_soon_threadsafe(transfers.execute, effect)

    def _compute(self) -> None:
        """What fails here has failed in the middle of what the ranks do together."""
        try:
            while True:
                self._runner.follow(self._steps.get().sizes)
        except BaseException:  # noqa: BLE001 rank 0 would wait for this one for ever
            sys.excepthook(*sys.exc_info())
            os._exit(ExitCode.FAULT)

    def _post(self, event: Event) -> None:
        assert isinstance(event, PullDone | BlocksDigested)
        said = Pulled(event) if isinstance(event, PullDone) else Digested(event)
        try:
            self._wire.send(said)
        except OSError:
            os._exit(ExitCode.OK)  # rank 0 is gone


def _model(config: WorkerConfig) -> ServedModel:
    return read_model(config.model, config.model_impl, config.load_format == "dummy")


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we end with rank 0
    wire = Wire(socket.socket(fileno=int(argv[0])), ToRank)
    begin = wire.receive()
    if not isinstance(begin, Begin):
        return ExitCode.OK
    try:
        follower = Follower(begin, wire)
        asyncio.run(follower.run())
    except StartError as error:
        wire.send(Refused(str(error), error.exit_code))
        return error.exit_code
    except ModelError as error:
        line = f"slipstream {begin.role}: {error}"
        wire.send(Refused(line, ExitCode.MODEL))
        return ExitCode.MODEL
    os._exit(ExitCode.OK)  # the compute thread may wait for ranks that are gone


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
