"""Which LoRA adapters there are, and that every worker of their model has them.

What is wanted is held here; what a worker has, it says in `Hello`. A few times a second the two
are compared: who lacks one is told to load it, who has one that nobody can ask for any more, to
retire it, and in the end to let it go. A version that was replaced stays until the last request
that began with it has ended. A young scheduler takes what workers have, and is not retired, for
wanted; so who takes one away hears of it when every worker has.
"""

from collections import OrderedDict
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import msgspec

from slipstream.core.machine import Effect, Note, Send
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import (
    AdapterAnswer,
    AdapterChanged,
    AdapterInfo,
    ChangeAdapter,
    NodeInfo,
    UnwantAdapter,
    WantAdapter,
)
from slipstream.scheduler.fleet import Fleet
from slipstream.types import NodeId

LOAD_S = 60.0
"""How long a change waits for the workers."""
AGAIN_S = 10.0
"""After this a worker that lacks an adapter is told again."""
RETIRE_S = 10.0
"""So long after nobody could ask for it any more the last request with it has come here."""
AWAY_S = 300.0
"""A model that is gone for so long keeps no names; as long as frontends know it."""
CHANGES_MAX, REMOVED_MAX = 64, 4096


@dataclass(slots=True, eq=False)
class _Change:
    """An adapter that is being loaded, or without a path retired, by all workers of a model."""

    asked: ChangeAdapter
    frontend: NodeId
    generation: int
    due_s: float
    waits_for: set[NodeId]
    read: dict[NodeId, AdapterInfo] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.asked.model, self.asked.name


class Adapters:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._wanted: dict[tuple[str, str], AdapterInfo] = {}
        """(Model, name) -> the version that new requests get."""
        self._removed: OrderedDict[tuple[str, str], int] = OrderedDict()
        """Those that were taken away -> the generation by then."""
        self._changes: dict[str, _Change] = {}
        self._told_s: dict[tuple[NodeId, str], float] = {}
        """When a worker was last told to load or to let go of something."""
        self._known: dict[tuple[str, str], AdapterInfo] = {}
        """(Model, id): what lives in requests or is wanted; it may have to be loaded again."""
        self._unused_s: dict[str, float] = {}
        """Ids that nobody has, or can ask for -> since when."""
        self._away_s: dict[str, float] = {}
        """Models with adapters and without any process -> since when."""
        self._generation = 0
        self.recovering = False
        """A young scheduler knows of no change before it."""

    def of(self, model: str) -> list[AdapterInfo]:
        return [adapter for (name, _), adapter in sorted(self._wanted.items()) if name == model]

    def hello(self, node: NodeInfo, now_s: float) -> list[Effect]:
        """Take what a worker was started with for wanted, and, while what was wanted is not known,
        what it was told to load."""
        notes: list[Effect] = []
        for adapter in node.worker.adapters if node.worker is not None else ():
            key = node.model, adapter.name
            self._generation = max(self._generation, adapter.generation)
            self._known[node.model, adapter.adapter_id] = adapter
            known = self._wanted.get(key)
            if known is not None and known.generation >= adapter.generation:
                continue
            pending = any(change.key == key for change in self._changes.values())
            started = adapter.generation == 0 or self.recovering
            if not started or adapter.retired or pending or key in self._removed:
                continue
            if taken := self._taken(*key):
                notes.append(Note(f"{node.node_id} has an adapter that nobody gets: {taken}"))
                continue
            self._wanted[key] = adapter
        self._list()
        return [*notes, *self._settle(now_s)]

    def down(self, peer: NodeId, now_s: float) -> list[Effect]:
        for key in [key for key in self._told_s if key[0] == peer]:
            del self._told_s[key]
        for change in self._changes.values():
            change.waits_for.discard(peer)
            change.read.pop(peer, None)
        return self._settle(now_s)

    def received(
        self,
        source: NodeId,
        message: ChangeAdapter | AdapterAnswer,
        now_s: float,
    ) -> list[Effect]:
        if isinstance(message, ChangeAdapter):
            return self._change(source, message, now_s)
        return self._answered(source, message, now_s)

    def _change(self, frontend: NodeId, asked: ChangeAdapter, now_s: float) -> list[Effect]:
        problem = self._refusal(asked)
        if problem is not None:
            return [Send(frontend, AdapterChanged(call_id=asked.call_id, problem=problem))]
        self._generation += 1
        workers = {node.node_id for node in self._workers(asked.model)}
        due_s = now_s + LOAD_S
        change = _Change(asked, frontend, self._generation, due_s, workers)
        self._changes[asked.call_id] = change
        if not asked.path:
            return [*self._remove(change), *self._settle(now_s)]
        want = WantAdapter(name=asked.name, path=asked.path, generation=self._generation)
        return [Send(worker, want) for worker in sorted(workers)]

    def _answered(self, worker: NodeId, answer: AdapterAnswer, now_s: float) -> list[Effect]:
        for change in list(self._changes.values()):
            meant = answer.generation == change.generation and change.asked.path
            if not meant or worker not in change.waits_for:
                continue
            change.waits_for.discard(worker)
            if answer.adapter is None:
                problem = answer.problem or _broken(f"{worker} did not say why")
                return self._over(change, problem)
            change.read[worker] = answer.adapter
        if answer.problem is not None:
            why = f"{worker} lacks the adapter {answer.name}: {answer.problem.message}"
            return [Note(why), *self._settle(now_s)]
        return self._settle(now_s)

    def tick(self, used: Set[str], now_s: float) -> list[Effect]:
        """`used`: ids that live requests have."""
        effects = self._settle(now_s)
        self._forget(now_s)
        wanted = {adapter.adapter_id for adapter in self._wanted.values()}
        pending = {change.key for change in self._changes.values() if change.asked.path}
        known = self._known.items()
        self._known = {key: adapter for key, adapter in known if key[1] in wanted | used}
        unused: dict[str, float] = {}
        for node in self._fleet.nodes.values():
            if node.worker is None:
                continue
            for adapter in node.worker.adapters:
                adapter_id = adapter.adapter_id
                if adapter_id in wanted or (node.model, adapter.name) in pending:
                    continue
                if adapter_id not in used:
                    unused[adapter_id] = self._unused_s.get(adapter_id, now_s)
                over = now_s >= unused.get(adapter_id, now_s) + RETIRE_S
                if over or not adapter.retired:
                    unwant = UnwantAdapter(adapter_id=adapter_id, at_once=over)
                    effects += self._tell(node.node_id, f"{over} {adapter_id}", unwant, now_s)
            effects += self._load(node, used, now_s)
        self._unused_s = unused
        return effects

    def _forget(self, now_s: float) -> None:
        """Adapters of models that are gone for good; what was told long ago."""
        there = set(self._fleet.models())
        away = {model for model, _ in self._wanted} - there
        self._away_s = {model: self._away_s.get(model, now_s) for model in away}
        for model in [m for m, since_s in self._away_s.items() if now_s >= since_s + AWAY_S]:
            for key in [key for key in self._wanted if key[0] == model]:
                del self._wanted[key]
            self._list()
        told = self._told_s.items()
        self._told_s = {key: at_s for key, at_s in told if now_s < at_s + AGAIN_S}

    def _load(self, node: NodeInfo, used: Set[str], now_s: float) -> Iterator[Effect]:
        """What is wanted and not there, or retired; and older versions, for requests that would
        find nobody else to go on with."""
        assert node.worker is not None
        there = {adapter.adapter_id: adapter for adapter in node.worker.adapters}
        wanted = {adapter.adapter_id: adapter for adapter in self.of(node.model)}
        older = [
            adapter
            for (model, adapter_id), adapter in sorted(self._known.items())
            if model == node.model and adapter_id in used - wanted.keys()
        ]
        for known in (*wanted.values(), *older):
            have, retired = there.get(known.adapter_id), known.adapter_id not in wanted
            if have is not None and (retired or not have.retired):
                continue
            want = WantAdapter(
                name=known.name, path=known.path, generation=known.generation, retired=retired
            )
            yield from self._tell(node.node_id, known.adapter_id, want, now_s)

    def check(self) -> None:
        assert len(self._changes) <= CHANGES_MAX
        for change in self._changes.values():
            assert change.waits_for <= self._fleet.nodes.keys()
        names = [name for _, name in self._wanted]
        assert len(set(names)) == len(names), "each name is one adapter's"

    def _tell(
        self, worker: NodeId, what: str, message: WantAdapter | UnwantAdapter, now_s: float
    ) -> Iterator[Effect]:
        if now_s >= self._told_s.get((worker, what), -AGAIN_S) + AGAIN_S:
            self._told_s[worker, what] = now_s
            yield Send(worker, message)

    def _workers(self, model: str) -> list[NodeInfo]:
        return [node for node in self._fleet.nodes.values() if node.worker and node.model == model]

    def _refusal(self, asked: ChangeAdapter) -> Problem | None:
        key, name = (asked.model, asked.name), asked.name
        if self.recovering or len(self._changes) >= CHANGES_MAX:
            text = "The scheduler is finding out what there is, or is busy; ask again."
            return Problem(code=ErrorCode.NOT_READY, message=text, retry_after_s=2.0)
        if any(change.key == key for change in self._changes.values()):
            return _invalid(f"The LoRA adapter '{name}' is being loaded; wait for that to end.")
        if not asked.path:
            if key in self._wanted:
                return None
            text = f"There is no LoRA adapter '{name}'. GET /v1/models lists what there is."
            return Problem(code=ErrorCode.MODEL_NOT_FOUND, message=text, param="lora_name")
        if taken := self._taken(*key):
            return _invalid(f"{taken}; give the adapter another name.")
        if key in self._wanted and not asked.replace:
            return _invalid(
                f"The LoRA adapter '{name}' is loaded already; unload it, or say load_inplace: "
                "true."
            )
        if not self._workers(asked.model):
            text = f"There is no worker of the model '{asked.model}' now; ask again."
            return Problem(code=ErrorCode.NO_WORKER, message=text, retry_after_s=5.0)
        return None

    def _taken(self, model: str, name: str) -> str:
        """Whose name it is already; empty: nobody else's."""
        if name in self._fleet.models():
            return f"'{name}' is the name of a model"
        others = [other for other, adapter in self._wanted if adapter == name and other != model]
        return f"'{name}' is an adapter of '{others[0]}'" if others else ""

    def _remove(self, change: _Change) -> list[Effect]:
        gone = self._wanted.pop(change.key)
        self._removed[change.key] = change.generation
        if len(self._removed) > REMOVED_MAX:
            self._removed.popitem(last=False)
        self._list()
        unwant = UnwantAdapter(adapter_id=gone.adapter_id)
        told = [Send(worker, unwant) for worker in sorted(change.waits_for)]
        return [*self._fleet.announce(), *told]

    def _offering(self, change: _Change) -> set[NodeId]:
        """Workers that have it, and not only for old requests."""
        return {
            node.node_id
            for node in self._workers(change.asked.model)
            if node.worker is not None
            and any(a.name == change.asked.name and not a.retired for a in node.worker.adapters)
        }

    def _settle(self, now_s: float) -> list[Effect]:
        """Changes that nothing is waited for any more."""
        effects: list[Effect] = []
        for change in list(self._changes.values()):
            if not change.asked.path:
                change.waits_for = self._offering(change)
                if not change.waits_for:
                    effects += self._over(change, None)
                    continue
            ids = {adapter.adapter_id for adapter in change.read.values()}
            if len(ids) > 1:
                text = f"The workers found different files in {change.asked.path}."
                effects += self._over(change, _invalid(text))
            elif not change.waits_for and not ids:
                effects += self._over(change, _broken("its workers are gone"))
            elif not change.waits_for:
                adapter = next(iter(change.read.values()))
                self._wanted[change.key] = msgspec.structs.replace(
                    adapter, generation=change.generation
                )
                self._removed.pop(change.key, None)
                self._list()
                effects += [*self._fleet.announce(), *self._over(change, None)]
            elif now_s >= change.due_s:
                late = ", ".join(sorted(change.waits_for))
                effects += self._over(change, _broken(f"no word of {late} for {LOAD_S:g} s"))
        return effects

    def _over(self, change: _Change, problem: Problem | None) -> list[Effect]:
        del self._changes[change.asked.call_id]
        told = AdapterChanged(call_id=change.asked.call_id, problem=problem)
        return [Send(change.frontend, told)]

    def _list(self) -> None:
        self._fleet.adapters = {model: self.of(model) for model, _ in self._wanted}


def _invalid(message: str) -> Problem:
    return Problem(code=ErrorCode.INVALID_VALUE, message=message, param="lora_name")


def _broken(why: str) -> Problem:
    text = f"The LoRA adapters are not what was asked for: {why}. Ask again."
    return Problem(code=ErrorCode.NOT_READY, message=text, retry_after_s=5.0)
