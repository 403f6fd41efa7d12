"""The queues, one for each model, and the way out of them: onto workers, in order."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from slipstream.core.machine import Effect, Note, Send
from slipstream.errors import ErrorCode, Problem
from slipstream.messages import Decode, FirstToken, Prefill, ShiftRole, WorkerLoad
from slipstream.scheduler.admission import Expected, no_worker, too_late
from slipstream.scheduler.decisions import Decisions
from slipstream.scheduler.demand import Demand, Placement
from slipstream.scheduler.fleet import NOBODY, Fleet
from slipstream.scheduler.lane import Lane
from slipstream.scheduler.ledger import Ledger, WorkerView
from slipstream.scheduler.policy import Rules, place
from slipstream.scheduler.prices import TransferPrices
from slipstream.scheduler.request import Request, State
from slipstream.types import NodeId, RequestId

CAUTION = 2.0
"""Of a first token's predicted seconds to those that it may take where a target is to be kept: when
load rises, prices are still those of the time before, and whoever is refused takes CPU time too."""

LATE_MOST = 0.75
"""How late a first token may be expected to be, as a share of the target."""


class Dispatcher:
    """Requests wait here, not at the workers, so that they are placed by what is true then."""

    def __init__(
        self,
        fleet: Fleet,
        rules: Rules,
        ttft_target_s: float = math.inf,
        recovery_wait_s: float = math.inf,
    ):
        self.fleet, self.rules, self.ttft_target_s = fleet, rules, ttft_target_s
        self._recovery_wait_s = recovery_wait_s
        self.lanes: dict[str, Lane] = {}
        """Of the models that are served, and of those that are waited for."""
        self.ledger = Ledger()
        self.transfers = TransferPrices()
        self.decisions = Decisions()
        self.placed: Counter[str] = Counter()
        self.waited_s = 0.0
        """Of all that were placed, together."""
        self.late: list[tuple[Request, Problem]] = []
        """In the queue, and not to be waited for any more: whoever drives this ends them."""
        self._begun: dict[str, set[RequestId]] = {}
        """Calls that have several choices, perhaps -> those that were placed and are not over."""

    def lane(self, model: str) -> Lane:
        return self.lanes.get(model) or self.lanes.setdefault(model, Lane(model))

    def waits(self, request: Request) -> bool:
        """Whether it is in a queue."""
        lane = self.lanes.get(request.model)
        return lane is not None and request.request_id in lane.queue

    def enqueue(self, request: Request, now_s: float) -> None:
        """Among those of its priority; what had begun before goes to the queue's head."""
        request.state = State.QUEUED
        lane = self.lane(request.model)
        ahead = lane.queue.join(request)
        if ahead and lane.lacks_s:
            ahead = sum(_is_served(before, lane.longest) for before in islice(lane.queue, ahead))
        if ahead and not request.resumed:
            wait_s = ahead / lane.pace.per_s(lane.full_since_s, now_s)
            self._judge(request, Expected(now_s - request.since_s, wait_s))

    def remove(self, request: Request) -> None:
        self.lane(request.model).queue.remove(request)

    def loaded(self, source: NodeId, load: WorkerLoad, now_s: float) -> None:
        """A worker has said how it is."""
        self.fleet.loaded(source, load, now_s)
        self.transfers.learn(source, load.transfer_samples, now_s)
        view = self.ledger.views.get(source)
        if view is not None and load.step_samples:
            view.prices.learn(load.step_samples, now_s)

    def sync(self, now_s: float) -> None:
        """The fleet has changed."""
        models = self.fleet.models()
        self.lanes = {
            name: lane for name, lane in self.lanes.items() if name in models or lane.queue
        }
        for model in models:
            self._missing(self.lane(model), now_s)
        taking = {node.node_id for model in models for node in self.fleet.workers(model)}
        self.ledger.sync(self.fleet.nodes.values(), taking)
        for lane in self.lanes.values():
            lane.longest = _longest_served(self._views(lane)[0])
        self.transfers.sync(self.ledger.views)

    def _missing(self, lane: Lane, now_s: float) -> str:
        missing = self.fleet.missing(lane.model)
        lane.whole_s = min(lane.whole_s, now_s) if missing else now_s
        if missing:
            lane.full_since_s = now_s  # of workers that are not there the pace says nothing
        return missing

    def dispatch(self, now_s: float) -> list[Effect]:
        """Place what waits."""
        effects: list[Effect] = []
        for lane in self.lanes.values():
            effects += self._dispatch(lane, now_s)
        return effects

    def _views(self, lane: Lane) -> tuple[list[WorkerView], list[WorkerView]]:
        """Workers of its model, and the others."""
        own: list[WorkerView] = []
        others: list[WorkerView] = []
        for view in self.ledger.views.values():
            (own if view.worker.model == lane.model else others).append(view)
        return own, others

    def _dispatch(self, lane: Lane, now_s: float) -> list[Effect]:
        """Until somebody finds no room. Nobody is overtaken, but who is served by no worker, or by
        none of those that have room."""
        effects: list[Effect] = []
        views, others = self._views(lane) if lane.queue else ([], [])
        longest, full = lane.longest, False
        while (
            request := next((r for r in lane.queue if _is_served(r, longest)), None)
        ) is not None:
            if (problem := request.overdue(now_s)) is not None:
                self._turn_away(request, problem)
                continue
            demand = request.demand()
            turn = self.placed["alone"] + self.placed["apart"]
            able = [view for view in views if view.serves(request)]
            placement = place(demand, able, self.transfers, self.rules, turn, now_s, others)
            if placement is None:
                full = True
                if len(able) == len(views):
                    break
                views = [view for view in views if view not in able]  # the next room there is its
                longest = _longest_served(views)
            elif self._judge(request, self._expected(request, placement, now_s)):
                effects += self._assign(request, demand, placement, now_s)
        if not full:
            lane.full_since_s = now_s
        return effects

    def _expected(self, request: Request, placement: Placement, now_s: float) -> Expected:
        """By twice its price, and by how late those before it were; by its wait alone if no price
        is known."""
        waited_s = now_s - request.since_s
        known = self.ledger.views[placement.computes].prices.knows_prompts
        if not (placement.ttft_s and known):
            return Expected(waited_s, 0.0)
        # Not more than a part of the target: else lateness would turn away who could mend it.
        margin_s = self.lane(request.model).lateness.margin_s(now_s)
        late_s = min(margin_s, LATE_MOST * self.ttft_target_s)
        ahead_s = placement.ttft_s + max((CAUTION - 1) * placement.ttft_s, late_s)
        return Expected(waited_s, ahead_s, CAUTION * placement.alone_s)

    def _judge(self, request: Request, expected: Expected) -> bool:
        """Whether it stays; who is refused is in `late`."""
        begun = request.begun or request.call in self._begun  # one refused choice ends them all
        problem = None if begun else too_late(expected, self.ttft_target_s)
        if problem is not None:
            self._turn_away(request, problem)
        return problem is None

    def _turn_away(self, request: Request, problem: Problem) -> None:
        self.remove(request)
        self.late.append((request, problem))

    def expire(self, now_s: float) -> None:
        """Nobody waits for longer than the target, or goes on to wait who will have to; or for
        workers that do not come."""
        for lane in self.lanes.values():
            missing = self._missing(lane, now_s)
            if now_s >= lane.whole_s + self._recovery_wait_s:
                for request in list(lane.queue):
                    self._turn_away(request, no_worker(missing))
            self._expire_unserved(lane, missing, now_s)
            pace = lane.pace.per_s(lane.full_since_s, now_s)
            served = [request for request in lane.queue if _is_served(request, lane.longest)]
            for ahead, request in enumerate(served):
                self._judge(request, Expected(now_s - request.since_s, ahead / pace))

    def _expire_unserved(self, lane: Lane, missing: str, now_s: float) -> None:
        """Nobody waits for ever for what no worker has."""
        unserved = [request for request in lane.queue if not _is_served(request, lane.longest)]
        waiting = [(request, _lack(request, lane.longest)) for request in unserved]
        lane.lacks_s = {lack: lane.lacks_s.get(lack, now_s) for _, lack in waiting}
        for request, lack in waiting:
            if now_s >= lane.lacks_s[lack] + self._recovery_wait_s:
                self._turn_away(request, no_worker(missing or lack))

    def ended(self, request: Request, problem: Problem | None, now_s: float) -> None:
        """It is over, whatever came of it."""
        if problem is None or problem.code is not ErrorCode.QUEUE_FULL:  # that had no place
            self.lane(request.model).pace.ended(now_s)
        siblings = self._begun.get(request.call, set())
        siblings.discard(request.request_id)
        if not siblings:
            self._begun.pop(request.call, None)

    def tick(self, now_s: float) -> list[Effect]:
        """To be called about once a second: prices of what is not used fade, roles shift. Who asks
        for no prices has no use for other roles."""
        self.ledger.fade(now_s)
        self.transfers.fade(now_s)
        if self.rules != Rules("cost", "auto"):
            return []
        effects: list[Effect] = []
        for lane in self.lanes.values():
            shift = lane.roles.shift(self._views(lane)[0], len(lane.queue), now_s)
            if shift is not None:
                told = Send(shift.node_id, ShiftRole(accept_decode=shift.accept_decode))
                effects += [told, Note(shift.line)]
        return effects

    def statistics(self) -> dict[str, float]:
        lanes = self.lanes.values()
        return {
            **{f"requests_placed_{name}_total": count for name, count in self.placed.items()},
            "requests_waited_seconds_total": self.waited_s,
            "queued_tokens": sum(lane.queue.num_tokens for lane in lanes),
            "ttft_prediction_error_median": self.decisions.median_error(),
            "role_shifts_total": sum(lane.roles.shifts for lane in lanes),
        }

    def check(self, requests: Mapping[RequestId, Request]) -> None:
        """Against all that there are."""
        assert not self.late
        for model, lane in self.lanes.items():
            lane.queue.check()
            assert {request.request_id for request in lane.queue} <= requests.keys()
            assert all(request.model == model == lane.model for request in lane.queue)
        assert all(placed and placed <= requests.keys() for placed in self._begun.values())
        live = [r for r in requests.values() if r.state is not State.FINISHING]
        for node_id, view in self.ledger.views.items():
            view.check({r.request_id: r.num_blocks for r in live if node_id in r.workers})

    # --- The account ------------------------------------------------------------------------------

    def adopt(self, request: Request, worker: NodeId, now_s: float) -> None:
        """It runs there, from before our time."""
        request.state, request.decode = State.DECODING, worker
        self._give(request, worker, now_s)

    def first_token(self, request: Request, message: FirstToken, now_s: float) -> None:
        """Its prompt is computed."""
        late_s = self.decisions.first_token(message, now_s)
        if late_s is not None:
            self.lane(request.model).lateness.learn(late_s, now_s)
        view = self.ledger.views.get(request.prefill or request.decode or "")
        if view is not None:
            view.computed(request.request_id, now_s)

    def settled(self, request: Request, now_s: float) -> None:
        """It runs where it decodes; the worker that computed it is out of it."""
        source, request.prefill = request.prefill, None
        request.state = State.DECODING
        self._take_back(request, source, now_s)

    def take_back(self, request: Request, now_s: float) -> None:
        """Nobody has anything of it any more, or nothing that counts."""
        for worker in request.workers:
            self._take_back(request, worker, now_s)

    def _take_back(self, request: Request, worker: NodeId | None, now_s: float) -> None:
        view = self.ledger.views.get(worker or "")
        if view is not None:
            view.take_back(request.request_id, now_s)

    def _give(self, request: Request, worker: NodeId, now_s: float) -> None:
        self._begun.setdefault(request.call, set()).add(request.request_id)
        view = self.ledger.views[worker]
        view.give(request.request_id, request.num_blocks)
        if worker == request.decode:
            view.give_stream(request.request_id, request.num_tokens)

    def _assign(
        self, request: Request, demand: Demand, placement: Placement, now_s: float
    ) -> list[Effect]:
        lane = self.lane(request.model)
        lane.queue.take(request)
        source, target = placement.prefill, placement.decode
        request.prefill, request.decode, request.placed_s = source, target, now_s
        for worker in sorted(request.workers):
            self._give(request, worker, now_s)
        cached = max(demand.cached_blocks(placement.computes), placement.holder_blocks)
        computes = self.ledger.views[placement.computes]
        prompt = demand.prompt(cached)
        computes.give_prompt(request.request_id, prompt, now_s)
        work_s = computes.prices.prompt_s(prompt)
        lane.roles.demand.add(work_s, now_s)
        waited_s = max(0.0, now_s - request.since_s)
        self.waited_s += waited_s
        request.decision = self.decisions.note(
            demand,
            placement,
            now_s,
            attempt=request.attempt,
            policy=self.rules.policy,
            waited_s=waited_s,
            migrations=request.migrations,
        )
        self.placed["alone" if source is None else "apart"] += 1
        self.placed["fetching"] += placement.holder is not None
        request.state = State.DECODING if source is None else State.PREFILLING
        return [Send(to, message) for to, message in self._messages(request, placement, now_s)]

    def _messages(
        self, request: Request, placement: Placement, now_s: float
    ) -> Iterable[tuple[NodeId, Decode | Prefill]]:
        submit, source, target = request.submit, placement.prefill, placement.decode
        assert request.decision is not None
        holder = self.fleet.nodes.get(placement.holder or "")
        common: dict[str, Any] = {
            "request_id": request.request_id,
            "attempt": request.attempt,
            "prompt": submit.prompt,
            "accepted": submit.accepted,
            "sampling": submit.sampling,
            "tokenizer": request.tokenizer,
            "timeout_s": max(0.0, request.deadline_s - now_s),
            "adapter": submit.adapter,
            "salt": submit.salt,
            "decision": request.decision.header,
        }
        computing: dict[str, Any] = {
            "claimed_blocks": request.hints.get(placement.computes, 0),
            "holder": None if holder is None else holder.node_id,
            "holder_epoch": 0 if holder is None else holder.epoch,
            "holder_blocks": placement.holder_blocks,
        }
        if source is None:
            yield target, Decode(**common, **computing)
            return
        epoch = self.fleet.nodes[source].epoch
        yield target, Decode(**common, prefill=source, prefill_epoch=epoch)
        yield source, Prefill(**common, **computing, decode=target)


def _longest_served(views: Sequence[WorkerView]) -> dict[str, int]:
    """Adapter -> tokens of the longest request that there are workers for: to compute its prompt,
    and to run its stream."""
    taking = [view for view in views if view.taking]
    hosts = _longest(view for view in taking if view.worker.accept_decode)
    sources = _longest(view for view in taking if view.prefills)
    return {adapter: min(hosts[adapter], sources[adapter]) for adapter in hosts.keys() & sources}


def _longest(views: Iterable[WorkerView]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for view in views:
        for adapter in view.adapters:
            longest[adapter] = max(longest.get(adapter, 0), view.tokens_max)
    return longest


def _is_served(request: Request, longest: Mapping[str, int]) -> bool:
    """Whether it waits for nothing but room."""
    return request.longest <= longest.get(request.adapter, 0)


def _lack(request: Request, longest: Mapping[str, int]) -> str:
    """What one that is not served waits for."""
    if request.adapter not in longest:
        name = request.adapter.partition("@")[0]
        return f"no worker with the LoRA adapter '{name}'" if name else NOBODY
    return f"no worker that holds the {request.longest} tokens of one request"
