"""Who loads, replaces and unloads adapters while requests run, and asks again until it is so."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from slipstream.core import machine as m
from slipstream.errors import ErrorCode
from slipstream.messages import AdapterInfo, ChangeAdapter
from slipstream.types import NodeId, Role

if TYPE_CHECKING:
    from sim.cluster import Cluster

NAMES = "alpha", "beta"
MODEL = "fake"
AGAIN_S = 65.0
"""No answer for so long: perhaps it was done, perhaps not."""


class Operator:
    def __init__(self, cluster: Cluster, rng: Random) -> None:
        """`steps`: (name, path, whether the file changes before it)."""
        self.cluster, self.rng = cluster, rng
        self.steps = [("alpha", "/a", False), ("beta", "/b", False)]
        more = [("alpha", "/a2", False), ("alpha", "/a2", True), ("beta", "", False)]
        self.steps += [*rng.sample(more, rng.randrange(len(more) + 1)), ("beta", "/b", True)]
        self.final: dict[str, str] = {}
        """Name -> path, as it should be now."""
        self.overwritten: set[str] = set()
        """Versions that nobody can load any more."""
        self._asked = 0
        for path in ("/a", "/a2", "/b"):
            cluster.world.files[path] = 1
        cluster.world.at(0.6, self._next)

    def _next(self) -> None:
        if not self.steps:
            return
        name, path, changes = self.steps[0]
        if changes:
            self.overwritten.add(self.cluster.world.adapter_id(name, path))
            self.cluster.world.files[path] += 1
            self.steps[0] = name, path, False
        frontends = [n for n, r in self.cluster.layout.items() if r is Role.FRONTEND]
        process = self.cluster.world.processes.get(self.rng.choice(frontends))
        self._asked += 1
        asked = self._asked
        self.cluster.world.at(self.cluster.world.now_s + AGAIN_S, lambda: self._give_up(asked))
        if process is not None:
            change = ChangeAdapter(
                call_id=f"change-{asked}", model=MODEL, name=name, path=path, replace=True
            )
            process.post(m.AdapterAsked(change))

    def _give_up(self, asked: int) -> None:
        if asked == self._asked:
            self._next()

    def heard(self, effect: m.DeliverAdapter) -> None:
        if effect.changed.call_id != f"change-{self._asked}" or not self.steps:
            return
        name, path, _ = self.steps[0]
        problem = effect.changed.problem
        # It was taken away by a call whose answer was lost.
        if problem is None or (not path and problem.code is ErrorCode.MODEL_NOT_FOUND):
            self.final[name] = path
            self.steps.pop(0)
            wait_s = self.rng.uniform(0.1, 3.0)
        else:
            assert problem.code in (ErrorCode.NOT_READY, ErrorCode.NO_WORKER) or (
                "being loaded" in problem.message
            ), problem
            wait_s = 1.0
        self._asked += 1
        self.cluster.world.at(self.cluster.world.now_s + wait_s, self._next)

    def listed(self, frontend: NodeId) -> dict[str, AdapterInfo]:
        """What a client of this frontend may ask for."""
        process = self.cluster.world.processes[frontend]
        state = process.machine.membership.models.get(MODEL)  # type: ignore[attr-defined]
        return {} if state is None else {adapter.name: adapter for adapter in state.adapters}

    def unsettled(self) -> list[str]:
        """What is not everywhere yet, or has not been given back."""
        if self.steps:
            return [f"adapter change {self.steps[0]}"]
        wanted = {(name, path) for name, path in self.final.items() if path}
        found = []
        for node_id, process in self.cluster.world.processes.items():
            worker = process.info.worker
            if worker is None or worker.model != MODEL:
                continue
            info = process.machine.info  # type: ignore[attr-defined]
            has = {(adapter.name, adapter.path) for adapter in info.adapters}
            held = {adapter.adapter_id for adapter in info.adapters}
            if has != wanted or held != process.device.adapters or len(held) != len(has):
                found.append(f"{node_id} has {info.adapters}, not {wanted}")
        return found
