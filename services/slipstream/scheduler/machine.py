"""The owner of every request: accepts, places, times out, retries, and lets go.

A request begins with a tokenizer's `Submit` and ends with its `StreamEnded`, a `Failed`, or ten
seconds of silence of its tokenizer. In between it is in exactly one `State`. What was begun on a
lost worker goes on as the next attempt: `Drop` to who may still work on the old one, `Resume` to
the tokenizer, which from then on takes nothing older and submits again.
"""

from collections import Counter

from slipstream.core.machine import (
    Counted,
    Drain,
    Effect,
    Event,
    Exit,
    PeerDown,
    Received,
    Send,
    SetTimer,
    Started,
    TimerFired,
)
from slipstream.errors import Problem
from slipstream.messages import (
    AdapterAnswer,
    AttemptFailed,
    ChangeAdapter,
    Finished,
    FirstToken,
    Hello,
    Located,
    NodeInfo,
    Resume,
    StreamEnded,
    Submit,
    WorkerLoad,
)
from slipstream.messages import Started as JobStarted
from slipstream.scheduler.adapters import Adapters
from slipstream.scheduler.admission import refusal
from slipstream.scheduler.dispatcher import Dispatcher
from slipstream.scheduler.fleet import Fleet
from slipstream.scheduler.past import Past
from slipstream.scheduler.policy import Rules
from slipstream.scheduler.reports import Reports
from slipstream.scheduler.request import Request, State, drop, failed, given_up, question
from slipstream.scheduler.settings import SchedulerSettings
from slipstream.scheduler.suspects import Suspects, quarantined
from slipstream.types import ATTEMPTS_PER_MOVE, NodeId, RequestId, Role

TICK_S = 0.25
LOAD_S = 1.0
ORPHAN_GRACE_S = 10.0


class SchedulerMachine:
    def __init__(self, node: NodeInfo, settings: SchedulerSettings):
        self.node, self.settings = node, settings
        self.fleet = Fleet(settings.index_stride)
        self.requests: dict[RequestId, Request] = {}
        self.counters: Counter[str] = Counter()
        self.past, rules = Past(), Rules(settings.policy, settings.disaggregation)
        waits = settings.ttft_target_s, settings.recovery_wait_s
        self.dispatcher = Dispatcher(self.fleet, rules, *waits)
        self._reports, self._suspects = Reports(), Suspects()
        self.adapters = Adapters(self.fleet)
        self._counted: dict[str, float] = {}
        self._recovering = False
        self._draining = False
        self._load_due_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = self._on(event, now_s)
        effects += self.dispatcher.dispatch(now_s)
        late, self.dispatcher.late = self.dispatcher.late, []
        for request, problem in late:
            effects += self._fail(request, problem, now_s)
        if self._draining and (not self.requests or self.fleet.of_role(Role.FRONTEND)):
            effects.append(Exit())
        return effects

    def statistics(self) -> dict[str, float]:
        states = sum(self._states().values(), Counter[str]())
        return {
            **{f"requests_{state}": states[state] for state in State},
            **{f"requests_{name}_total": count for name, count in self.counters.items()},
            **self.dispatcher.statistics(),
            "nodes": len(self.fleet.nodes),
            **self._counted,
        }

    def _states(self) -> dict[str, Counter[str]]:
        """By model: how many requests are in each state."""
        states: dict[str, Counter[str]] = {}
        for request in self.requests.values():
            states.setdefault(request.model, Counter())[request.state] += 1
        return states

    def check(self) -> None:
        for request_id, request in self.requests.items():
            assert request.request_id == request_id
            assert (request.state is State.QUEUED) == self.dispatcher.waits(request)
            assert (request.prefill is not None) <= (request.state is State.PREFILLING)
            placed = request.state in (State.PREFILLING, State.DECODING, State.FINISHING)
            assert placed == (request.decode is not None), request.state
            assert all(worker in self.fleet.nodes for worker in request.workers)
        self.dispatcher.check(self.requests)
        self.adapters.check()

    # --- Events -----------------------------------------------------------------------------------

    def _on(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case Received(source, message):
                return self._received(source, message, now_s)
            case TimerFired("tick"):
                return self._tick(now_s)
            case TimerFired("recovered"):
                return self._recovered()
            case TimerFired("reports"):
                return self._drop_reports()
            case TimerFired(key) if key.startswith("locate "):
                self._located(self.requests.get(key.removeprefix("locate ")), None, now_s)
            case PeerDown(peer):
                return self._peer_down(peer, now_s)
            case Started():
                self._recovering = self.adapters.recovering = True
                grace_s = self.settings.recovery_grace_s
                return [
                    SetTimer("tick", now_s + TICK_S),
                    SetTimer("recovered", now_s + grace_s),
                    SetTimer("reports", now_s + grace_s + ORPHAN_GRACE_S),
                ]
            case Drain():
                self._draining = True
            case Counted(values):
                self._counted = values
        return []

    def _received(self, source: NodeId, message: object, now_s: float) -> list[Effect]:
        match message:
            case Hello() if message.node.node_id == source:
                return self._hello(source, message, now_s)
            case Submit():
                return self._submit(source, message, now_s)
            case StreamEnded():
                request = self.requests.get(message.request_id)
                if request is not None and request.tokenizer == source:
                    return self._end(request, now_s)
            case WorkerLoad() if source in self.fleet.nodes:
                self.dispatcher.loaded(source, message, now_s)
            case FirstToken():
                request = self._current(message.request_id, message.attempt)
                if request is not None and source in request.workers:
                    self.dispatcher.first_token(request, message, now_s)
                    return self._freed(request, now_s)
            case Located():
                request = self._current(message.request_id, message.attempt)
                self._located(request, message, now_s)
            case JobStarted():
                request = self._current(message.request_id, message.attempt)
                if request is not None and request.decode == source and request.prefill:
                    self.dispatcher.settled(request, now_s)
                    return self._freed(request, now_s)  # it has had a token, whoever said so
            case Finished():
                return self._finished(source, message, now_s)
            case AttemptFailed():
                return self._attempt_failed(source, message, now_s)
            case ChangeAdapter() | AdapterAnswer():
                return self.adapters.received(source, message, now_s)
        return []

    def _current(self, request_id: RequestId, attempt: int) -> Request | None:
        request = self.requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    # --- Who is there -----------------------------------------------------------------------------

    def _hello(self, source: NodeId, hello: Hello, now_s: float) -> list[Effect]:
        first = self.fleet.hello(source, hello)
        self.dispatcher.sync(now_s)
        effects = [*self.adapters.hello(hello.node, now_s), *self.fleet.announce()]
        for live in hello.live if first and hello.node.worker else ():
            request = self._current(live.request_id, live.attempt)
            if live.waits:
                effects.append(Send(source, drop(live.request_id, live.attempt)))
            elif request is not None and request.state is State.RECOVERING:
                self._adopt(request, source, now_s)
            elif self._recovering:
                effects += self._reports.note(live, source)
            elif request is None or source not in request.workers:
                effects.append(Send(source, drop(live.request_id, live.attempt)))
        return effects

    def _peer_down(self, peer: NodeId, now_s: float) -> list[Effect]:
        heard_s, node = self.fleet.heard_s(peer), self.fleet.down(peer)
        if node is None:
            return []
        self._reports.lost(peer)
        effects = [*self.fleet.announce(), *self.adapters.down(peer, now_s)]
        for guilty in self._suspects.died(node, heard_s, self.requests.values()):
            effects += self._fail(guilty, quarantined(guilty), now_s)
        for request in list(self.requests.values()):
            if request.tokenizer == peer:
                request.orphan_s = now_s
            if peer in request.workers:
                effects += self._retry(request, "worker_lost", now_s, node)
        self.dispatcher.sync(now_s)
        return effects

    def _recovered(self) -> list[Effect]:
        """Attempts that nobody has reported so far are fenced off by the next one."""
        self._recovering = self.adapters.recovering = False
        unknown = [r for r in self.requests.values() if r.state is State.RECOVERING]
        return [effect for request in unknown for effect in self._resume(request)]

    def _drop_reports(self) -> list[Effect]:
        """No tokenizer wanted these."""
        effects: list[Effect] = []
        for request_id, (attempt, worker) in self._reports.drain().items():
            request = self._current(request_id, attempt)
            if request is None or worker not in request.workers:
                effects.append(Send(worker, drop(request_id, attempt)))
        return effects

    # --- A request's way --------------------------------------------------------------------------

    def _submit(self, source: NodeId, submit: Submit, now_s: float) -> list[Effect]:
        request = self.requests.get(submit.request_id)
        if request is None:
            return self._accept(source, submit, now_s)
        behind = submit.attempt < request.attempt
        if submit.owner < request.owner or (behind and source != request.tokenizer):
            return []  # the stream was moved away from there, or another frontend has it
        request.owner, request.orphan_s = submit.owner, None
        if behind:
            if request.state is State.RESUMING:
                return [Send(source, request.resumption())]
            return self._retry(request, "tokenizer_behind", now_s)
        newer = submit.attempt > request.attempt
        if not newer and request.state is State.FINISHING and not submit.repeated:
            # Its tokenizer has forgotten it, and the worker may have too: it heard of the end.
            return self._withdraw(request, now_s) + self._resume(request)
        if not newer and request.state is not State.RESUMING:
            return []
        effects = self._withdraw(request, now_s)
        request.replace(submit, source)
        return effects + (self._begin if newer else self._start)(request, now_s)

    def _accept(self, source: NodeId, submit: Submit, now_s: float) -> list[Effect]:
        tombstone = self.past.find(submit.request_id)
        if tombstone is not None and submit.attempt <= tombstone.attempt:
            if tombstone.problem is not None:
                return [Send(source, failed(submit.request_id, tombstone.problem))]
            again = Resume(request_id=submit.request_id, attempt=tombstone.attempt + 1)
            return [Send(source, again)]
        lane, live = self.dispatcher.lane(submit.model), len(self.requests)
        given = submit, self.fleet, self.settings, lane, now_s
        problem = refusal(*given, live=live, draining=self._draining)
        if problem is not None:
            self.counters[f"refused_{problem.code}"] += 1
            return [Send(source, failed(submit.request_id, problem))]
        self.counters["accepted"] += 1
        timeout_s = min(submit.timeout_s, self.settings.max_request_timeout_s)
        request = Request(submit, source, now_s + timeout_s, submit.attempt, State.RECOVERING)
        request.since_s = now_s
        self.requests[submit.request_id] = request
        return self._begin(request, now_s)

    def _begin(self, request: Request, now_s: float) -> list[Effect]:
        """Start what is fresh. What may run somewhere is adopted, or fenced off by the next
        attempt."""
        submit = request.submit
        attempt, worker = self._reports.take(submit.request_id, submit.attempt)
        effects: list[Effect] = []
        if worker:
            if submit.repeated and attempt == submit.attempt:
                self._adopt(request, worker, now_s)
                return []
            effects.append(Send(worker, drop(submit.request_id, attempt)))
        if not submit.repeated:
            return effects + self._start(request, now_s)
        request.state = State.RECOVERING
        return effects if self._recovering else effects + self._resume(request)

    def _start(self, request: Request, now_s: float) -> list[Effect]:
        """Ask the index, if there is something to ask and somebody to be asked; then queue."""
        if not self._suspects.admits(request):
            request.state = State.PROBATION
            return []
        request.hints = {}
        locate = question(request, self.fleet, self.settings.index_stride)
        indexes = self.fleet.of_role(Role.KVINDEX)
        if locate is None or not (indexes and self.settings.locate_timeout_s):
            self.dispatcher.enqueue(request, now_s)
            return []
        request.state = State.LOCATING
        self.counters["locates"] += 1
        index = indexes[self.counters["locates"] % len(indexes)]
        timer = SetTimer(f"locate {request.request_id}", now_s + self.settings.locate_timeout_s)
        return [Send(index, locate), timer]

    def _located(self, request: Request | None, found: Located | None, now_s: float) -> None:
        """The index has answered, or not in time: then there are no hints."""
        if request is None or request.state is not State.LOCATING:
            return
        request.located(found, self.settings.index_stride)
        self.counters["located" if request.hints else "located_nowhere"] += 1
        self.dispatcher.enqueue(request, now_s)

    def _adopt(self, request: Request, worker: NodeId, now_s: float) -> None:
        """It runs there, from before our time."""
        self.counters["adopted"] += 1
        self.dispatcher.adopt(request, worker, now_s)

    def _finished(self, source: NodeId, finished: Finished, now_s: float) -> list[Effect]:
        request = self._current(finished.request_id, finished.attempt)
        if request is None or source not in request.workers:
            return []
        # Ended by its first token: nothing comes to the decode worker.
        idle = [] if request.decode in (None, source) else [request.decode]
        self.dispatcher.take_back(request, now_s)
        request.state, request.prefill, request.decode = State.FINISHING, None, source
        return [Send(node, drop(request.request_id, request.attempt)) for node in idle]

    def _attempt_failed(self, source: NodeId, message: AttemptFailed, now_s: float) -> list[Effect]:
        request = self._current(message.request_id, message.attempt)
        if request is None or source not in request.workers:
            return []
        if message.problem is not None:
            return self._fail(request, message.problem, now_s)
        if self._suspects.failed(request, message):
            return self._fail(request, quarantined(request), now_s)
        lost = request.lost_by(message.cause)
        return self._retry(request, message.cause, now_s, self.fleet.nodes.get(lost))

    def _freed(self, request: Request, now_s: float) -> list[Effect]:
        following = self._suspects.freed(request)
        return [] if following is None else self._start(following, now_s)

    def _retry(
        self, request: Request, cause: str, now_s: float, node: NodeInfo | None = None
    ) -> list[Effect]:
        """The attempt is lost, perhaps with a worker. Everybody drops it; the next is submitted."""
        request.migrations += 1
        request.losses += node is None or not node.draining
        self.counters["migrated"] += 1
        limit, last = self.settings.max_migrations, (request.attempt + 1) % ATTEMPTS_PER_MOVE == 0
        if last or request.losses > limit:
            return self._fail(request, given_up(request, limit, cause), now_s)
        return self._withdraw(request, now_s) + self._resume(request)

    def _resume(self, request: Request) -> list[Effect]:
        request.attempt += 1
        request.state = State.RESUMING
        return [Send(request.tokenizer, request.resumption())]

    def _withdraw(self, request: Request, now_s: float) -> list[Effect]:
        """Take it from the queue and from its workers."""
        self.dispatcher.remove(request)
        self.dispatcher.take_back(request, now_s)
        workers = [node for node in sorted(request.workers) if node in self.fleet.nodes]
        request.prefill = request.decode = None
        return [Send(node, drop(request.request_id, request.attempt)) for node in workers]

    def _fail(self, request: Request, problem: Problem, now_s: float) -> list[Effect]:
        self.counters[f"failed_{problem.code}"] += 1
        told = Send(request.tokenizer, failed(request.request_id, problem))
        return [told, *self._end(request, now_s, problem)]

    def _end(self, request: Request, now_s: float, problem: Problem | None = None) -> list[Effect]:
        """It is over. A worker that has finished it keeps its tokens until they are heard."""
        finished = request.state is State.FINISHING and problem is None
        effects = [] if finished else self._withdraw(request, now_s)
        del self.requests[request.request_id]
        self.dispatcher.ended(request, problem, now_s)
        self.counters["ended"] += 1
        self.past.bury(request.request_id, request.attempt, problem, now_s)
        return effects + self._freed(request, now_s)

    # --- Time -------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = [SetTimer("tick", now_s + TICK_S)]
        self.past.expire(now_s)
        for request in list(self.requests.values()):
            if (problem := request.overdue(now_s)) is not None:
                effects += self._fail(request, problem, now_s)
            elif request.orphan_s is not None and now_s >= request.orphan_s + ORPHAN_GRACE_S:
                self.counters["orphaned"] += 1
                effects += self._end(request, now_s)
        self.dispatcher.expire(now_s)  # of those that are left: who has ended is not refused too
        effects += self.adapters.tick({r.adapter for r in self.requests.values()}, now_s)
        if now_s >= self._load_due_s:
            self._load_due_s = now_s + LOAD_S
            own = {self.node.node_id: self.statistics()}
            effects += self.fleet.tell_load(own, self._states())
            effects += self.dispatcher.tick(now_s)
        return effects
