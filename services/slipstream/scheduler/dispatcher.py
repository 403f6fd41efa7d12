"""The queue, and the way out of it: onto workers, in order."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from slipstream.core.machine import Effect, Send
from slipstream.messages import Decode, Prefill
from slipstream.scheduler.fleet import Fleet
from slipstream.scheduler.policy import Demand, Placement, WorkerView, place
from slipstream.scheduler.request import Request, State
from slipstream.types import NodeId, RequestId


class Dispatcher:
    """Requests wait here, not at the workers, so that they are placed by what is true then."""

    def __init__(self, fleet: Fleet, disaggregated: bool):
        self.fleet, self.disaggregated = fleet, disaggregated
        self.queue: OrderedDict[RequestId, Request] = OrderedDict()
        self.placed: Counter[str] = Counter()

    def enqueue(self, request: Request) -> None:
        """To the end of the queue; what had begun before goes to its head."""
        request.state = State.QUEUED
        self.queue[request.request_id] = request
        if request.submit.accepted or request.migrations:
            self.queue.move_to_end(request.request_id, last=False)

    def remove(self, request: Request) -> None:
        self.queue.pop(request.request_id, None)

    def dispatch(self, live: Iterable[Request], now_s: float) -> list[Effect]:
        """Place what waits until somebody finds no room: nobody overtakes."""
        if not self.queue:
            return []
        views = self._views(live)
        effects: list[Effect] = []
        for request in list(self.queue.values()):
            demand = Demand(request.num_tokens, request.num_blocks, request.hints)
            placement = place(demand, views.values(), self.disaggregated)
            if placement is None:
                break
            effects += self._assign(request, placement, now_s)
            _charge(views, request)
        return effects

    def _views(self, live: Iterable[Request]) -> dict[NodeId, WorkerView]:
        views = {
            node.node_id: WorkerView(node.node_id, node.role, node.worker)
            for node in self.fleet.workers()
            if node.worker is not None
        }
        for request in live:
            _charge(views, request)
        return views

    def _assign(self, request: Request, placement: Placement, now_s: float) -> list[Effect]:
        self.remove(request)
        source, target = placement.prefill, placement.decode
        request.prefill, request.decode = source, target
        submit, hints = request.submit, request.hints
        timeout_s = max(0.0, request.deadline_s - now_s)
        decode = Decode(
            request_id=request.request_id,
            attempt=request.attempt,
            prompt=submit.prompt,
            accepted=submit.accepted,
            sampling=submit.sampling,
            tokenizer=request.tokenizer,
            prefill=source,
            prefill_epoch=0 if source is None else self.fleet.nodes[source].epoch,
            timeout_s=timeout_s,
            salt=submit.salt,
            claimed_blocks=hints.get(target, 0) if source is None else 0,
        )
        if source is None:
            self.placed["alone"] += 1
            request.state = State.DECODING
            return [Send(target, decode)]
        self.placed["apart"] += 1
        request.state = State.PREFILLING
        prefill = Prefill(
            request_id=request.request_id,
            attempt=request.attempt,
            prompt=submit.prompt,
            accepted=submit.accepted,
            sampling=submit.sampling,
            tokenizer=request.tokenizer,
            decode=target,
            timeout_s=timeout_s,
            salt=submit.salt,
            claimed_blocks=hints.get(source, 0),
        )
        return [Send(target, decode), Send(source, prefill)]


def _charge(views: dict[NodeId, WorkerView], request: Request) -> None:
    """Count a request on the workers that hold something of it."""
    if request.state is State.FINISHING:
        return
    for node_id in request.workers:
        view = views.get(node_id)
        if view is None:
            continue  # draining
        view.assigned += 1
        view.blocks += request.num_blocks
    # A prompt computed where it decodes has no end that we hear of: it counts as a stream alone.
    source = views.get(request.prefill or "")
    if source is not None:
        demand = Demand(request.num_tokens, request.num_blocks, request.hints)
        source.queued_tokens += demand.uncached(source.node_id)
