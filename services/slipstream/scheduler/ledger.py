"""What each worker has been given and not finished: the scheduler's own account, true at once."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from slipstream.core.step_model import Prompt
from slipstream.messages import NodeInfo, WorkerInfo
from slipstream.scheduler.prices import StepPrices
from slipstream.scheduler.request import Request
from slipstream.types import BLOCK_TOKENS, NodeId, RequestId

PRICES_MAX = 1024

Device: TypeAlias = tuple[str, str]
"""A host and what workers there call it; of a worker that names none: its own."""


def device_of(node: NodeInfo, worker: WorkerInfo) -> Device:
    return (node.host, worker.device) if worker.device else (node.node_id, "")


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker, with what the scheduler has given it."""

    node: NodeInfo
    worker: WorkerInfo
    prices: StepPrices
    taking: bool = True
    """Whether it takes something new."""
    held: dict[RequestId, int] = field(default_factory=dict)
    """Requests that it may hold something of -> blocks, shared ones counted for each."""
    prompts: dict[RequestId, Prompt] = field(default_factory=dict)
    """Not computed yet, in order."""
    streams: dict[RequestId, int] = field(default_factory=dict)
    """Those that decode here, or will -> tokens that each step looks back on."""
    blocks: int = 0
    prompt_tokens: int = 0
    prompt_pairs: int = 0
    context_tokens: int = 0
    since_s: float = 0.0
    """When the first of `prompts` began, as far as we know."""
    node_id: NodeId = field(init=False)
    device: Device = field(init=False)
    """Workers of one host that name the same compete for it."""

    adapters: frozenset[str] = field(init=False)
    """Ids; the empty one among them, of requests that want none."""
    tokens_max: int = field(init=False)
    """Of one request, that it can hold."""
    prefills: bool = field(init=False)
    chunk_tokens: int = field(init=False)
    """Of a prompt, that a step computes."""
    known_costs: tuple[tuple[float, ...], float, float, float] | None = None
    """What the last look at the prices found."""

    def __post_init__(self) -> None:
        self.node_id = self.node.node_id
        self.sync(self.node, self.worker)

    def sync(self, node: NodeInfo, worker: WorkerInfo) -> None:
        """What it says of itself now."""
        self.node, self.worker, self.known_costs = node, worker, None
        self.device = device_of(node, worker)
        self.adapters = frozenset(["", *(adapter.adapter_id for adapter in worker.adapters)])
        self.tokens_max = min(worker.max_model_len, worker.num_blocks * BLOCK_TOKENS)
        self.prefills = worker.prefill_budget_tokens > 0
        self.chunk_tokens = max(BLOCK_TOKENS, worker.prefill_budget_tokens)

    def serves(self, request: Request) -> bool:
        """Whether it has what the request wants, and room for the longest answer. A worker that
        came after the request was checked may be smaller than those that were there."""
        return request.adapter in self.adapters and request.longest <= self.tokens_max

    def admits(self, num_blocks: int) -> bool:
        """Whether one more request may go there now, if it is served there: an idle worker takes
        it."""
        if not self.held:
            return True
        full = len(self.held) >= self.worker.max_num_seqs
        return not full and self.blocks + num_blocks <= self.worker.num_blocks

    def give(self, request_id: RequestId, num_blocks: int) -> None:
        self.held[request_id] = num_blocks
        self.blocks += num_blocks

    def give_prompt(self, request_id: RequestId, prompt: Prompt, now_s: float) -> None:
        if not self.prompts:
            self.since_s = now_s
        self.prompts[request_id] = prompt
        self.prompt_tokens += prompt.tokens
        self.prompt_pairs += prompt.pairs
        self.known_costs = None

    def give_stream(self, request_id: RequestId, context_tokens: int) -> None:
        self.known_costs = None
        self.streams[request_id] = context_tokens
        self.context_tokens += context_tokens

    def computed(self, request_id: RequestId, now_s: float) -> None:
        """The prompt is, or is not wanted any more."""
        prompt = self.prompts.pop(request_id, None)
        if prompt is not None:
            self.since_s = now_s
            self.prompt_tokens -= prompt.tokens
            self.prompt_pairs -= prompt.pairs
            self.known_costs = None

    def take_back(self, request_id: RequestId, now_s: float) -> None:
        """Everything that it had of the request."""
        self.computed(request_id, now_s)
        self.blocks -= self.held.pop(request_id, 0)
        self.context_tokens -= self.streams.pop(request_id, 0)
        self.known_costs = None

    def costs(self, now_s: float) -> tuple[float, float]:
        """Seconds of a decode step of what runs here, and until all prompts that wait here are
        computed."""
        known = self.known_costs
        # Each request looks at each worker, and few of them have changed since the last one did.
        if known is None or known[0] is not self.prices.terms:
            known = self.known_costs = self._costs()
        _, step_s, work_s, first_s = known
        # What has been done of the first one; the last bit is done when we hear of it.
        return step_s, work_s and work_s - min(max(0.0, now_s - self.since_s), 0.9 * first_s)

    def _costs(self) -> tuple[tuple[float, ...], float, float, float]:
        """The prices; seconds of a step, of all prompts, of the first one."""
        prices = self.prices
        step_s = prices.step_s(len(self.streams), self.context_tokens)
        work_s = prices.prompt_s(Prompt(self.prompt_tokens, self.prompt_pairs))
        work_s += math.ceil(self.prompt_tokens / self.chunk_tokens) * step_s
        first = next(iter(self.prompts.values()), None)
        first_s = 0.0 if first is None else prices.prompt_s(first) + step_s
        return prices.terms, step_s, work_s, first_s

    def check(self, held: Mapping[RequestId, int]) -> None:
        """`held`: what requests say that they have here, in blocks."""
        assert self.held == held, self.node_id
        assert self.prompts.keys() <= held.keys() and self.streams.keys() <= held.keys()
        assert self.blocks == sum(held.values())
        assert self.prompt_tokens == sum(prompt.tokens for prompt in self.prompts.values())
        assert self.prompt_pairs == sum(prompt.pairs for prompt in self.prompts.values())
        assert self.context_tokens == sum(self.streams.values())
        costs, self.known_costs = self.costs(0.0), None
        assert costs == self.costs(0.0)


class Ledger:
    """All workers that are there."""

    def __init__(self) -> None:
        self.views: dict[NodeId, WorkerView] = {}
        self._prices: dict[tuple[str, Device], StepPrices] = {}

    def sync(self, nodes: Iterable[NodeInfo], taking: Collection[NodeId]) -> None:
        """Who is there now, and who of them takes something new."""
        known, self.views = self.views, {}
        for node in nodes:
            if node.worker is None:
                continue
            view = known.get(node.node_id)
            if view is None or view.node.epoch != node.epoch:
                prices = self._price_of(node.model, device_of(node, node.worker))
                view = WorkerView(node, node.worker, prices)
            view.sync(node, node.worker)
            view.taking = node.node_id in taking
            self.views[node.node_id] = view

    def fade(self, now_s: float) -> None:
        """To be called now and then."""
        for prices in dict.fromkeys(view.prices for view in self.views.values()):
            prices.fade(now_s)

    def _price_of(self, model: str, device: Device) -> StepPrices:
        """What it was last time; else that of the model on other devices. Workers of one device
        have one price: what differs between theirs is noise, and would part streams that belong
        together."""
        known = self._prices.pop((model, device), None)
        same = [prices for (name, _), prices in self._prices.items() if name == model]
        self._prices[model, device] = prices = known or StepPrices(same)
        if len(self._prices) > PRICES_MAX:
            del self._prices[next(iter(self._prices))]
        return prices
