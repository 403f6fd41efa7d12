"""What work costs on each worker, in seconds, fitted to what the workers measure.

A fit keeps a known form and learns how many times each of its terms is what was believed before:
least squares of relative errors with a forgetting memory, drawn a little towards one common factor.
So it is without units, terms that nobody measures keep their proportion to those that are, and a
worker that becomes three times slower is believed three times slower in everything at once.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from slipstream.core.step_model import Prompt, StepModel
from slipstream.messages import StepSample, TransferSample
from slipstream.types import NodeId

FORGET = 0.97
"""What one sample leaves of the weight of those before it."""
PULL = 0.1
"""Weight of the common factor, in samples."""
LEAST = 0.02
"""A term never vanishes: nobody could find it again."""
SWEEPS = 8
SURPRISE = 1.5
"""A mean error of this factor in two reports in a row is news, not noise: the past is over."""
ABSURD_S = 3600.0
"""No step or READ takes as long: whoever says so has measured nothing."""
KNOWN_WELL = 8
"""Samples after which a kind can surprise."""
Sample: TypeAlias = tuple[int, Sequence[float], float]
"""Kind, what was done, measured seconds."""

TYPICAL = StepModel(
    base_s=5e-3,
    prefill_token_s=5e-5,
    prefill_pair_s=1e-9,
    decode_row_s=1e-4,
    decode_context_s=1e-7,
)
"""Of a worker that has measured nothing, and knows nobody who has. Its first report mends it."""
TYPICAL_TRANSFER = (1e-3, 5e-5)
"""Seconds of a READ, and of each block in it."""
FADE_S = 30.0
"""What nobody uses is not measured: what is believed of it comes closer, each time so much time
has passed, to what was best of it. Else who was slow once stayed unused, and so dear, for good."""
OWN_TIER = "tier"
"""What loads from a worker's own tiers say for a transport."""
USUAL_BLOCKS = 32
"""A chunk: of several transports the best is the one that is best at this."""


class _Kind(NamedTuple):
    """Of steps. `usual`: one of them; `terms`: those that it alone measures well."""

    usual: tuple[float, ...]
    terms: tuple[int, ...]


_KINDS = (
    _Kind(usual=(1.0, 0.0, 0.0, 8.0, 8.0 * 512), terms=(0, 3, 4)),  # decodes alone
    _Kind(usual=(1.0, 256.0, 256.0 * 256, 0.0, 0.0), terms=(1, 2)),  # with part of a prompt
)


class Fit:
    """`believed[i] * x[i]` summed is the price of x; `believed` follows the samples."""

    def __init__(self, prior: Sequence[float], kinds: int = 1):
        """`kinds`: samples of one kind do not make those of another forgotten."""
        self.believed = tuple(prior)
        self._seen = [0] * kinds
        """Samples of each kind since the last new beginning."""
        self._doubts: Sequence[Sample] = []
        """A surprising report: noise, unless the next one says the same."""
        self._prior: tuple[float, ...]
        self._squares: list[list[list[float]]]
        self._sums: list[list[float]]
        self._rebase(1.0)

    def price(self, x: Sequence[float]) -> float:
        return _sum(self.believed, x)

    def knows(self, kind: int) -> bool:
        return self._seen[kind] >= KNOWN_WELL

    def learn(self, samples: Sequence[Sample]) -> None:
        """Take in one report."""
        known = [sample for sample in samples if 0.0 < sample[2] < ABSURD_S]
        if not known:
            return
        if not any(self._seen):
            self._rebase(self._ratio(known))
        # Only what was known well can come as a surprise; the rest is ignorance, and soon mended.
        judged = [sample for sample in known if self.knows(sample[0])]
        if judged and not 1 / SURPRISE < (ratio := self._ratio(judged)) < SURPRISE:
            if not self._doubts:
                self._doubts = known
                return
            self._rebase(ratio)
            known = [*self._doubts, *known]
        self._doubts = []
        for kind, x, y in known:
            self._seen[kind] += 1
            self._add(kind, [p * v / y for p, v in zip(self._prior, x, strict=True)])
        self._solve()

    def fade(self, kind: int, factors: Sequence[float]) -> None:
        """Each term is believed so many times what it was; what this kind has measured counts no
        more, what the others have does."""
        prior = tuple(b * f for b, f in zip(self.believed, factors, strict=True))
        moved = [new / old for new, old in zip(prior, self._prior, strict=True)]
        for each, squares in enumerate(self._squares):
            keep = float(each != kind)
            self._sums[each] = [
                keep * s * by for s, by in zip(self._sums[each], moved, strict=True)
            ]
            for row, by in zip(squares, moved, strict=True):
                row[:] = [keep * s * by * other for s, other in zip(row, moved, strict=True)]
        self._seen[kind] = 0
        self._prior = self.believed = prior
        self._times = [1.0] * len(prior)

    def _ratio(self, samples: Sequence[Sample]) -> float:
        """How many times longer these took than their price."""
        price_s = sum(self.price(x) for _, x, _ in samples)
        return sum(y for _, _, y in samples) / max(1e-12, price_s)

    def _rebase(self, factor: float) -> None:
        """From here on as if this had been believed from the beginning, and nothing measured."""
        size = len(self.believed)
        self._prior = self.believed = tuple(b * factor for b in self.believed)
        self._times = [1.0] * size
        self._squares = [[[0.0] * size for _ in range(size)] for _ in self._seen]
        self._sums = [[0.0] * size for _ in self._seen]
        self._seen = [0] * len(self._seen)

    def _add(self, kind: int, shares: Sequence[float]) -> None:
        """`shares[i]`: the part of the measured time that the i-th term accounts for, if the prior
        is right; with the right factors they add up to 1."""
        squares, sums = self._squares[kind], self._sums[kind]
        for i, share in enumerate(shares):
            row = squares[i]
            for j, other in enumerate(shares):
                row[j] = FORGET * row[j] + share * other
            sums[i] = FORGET * sums[i] + share

    def _solve(self) -> None:
        """Gauss-Seidel on the normal equations, kept positive."""
        size = range(len(self._prior))
        squares = [[sum(kind[i][j] for kind in self._squares) for j in size] for i in size]
        sums = [sum(kind[i] for kind in self._sums) for i in size]
        common = sum(sums) / max(1e-9, sum(map(sum, squares)))
        times = self._times
        for _ in range(SWEEPS):
            for i in size:
                rest = sums[i] - sum(squares[i][j] * times[j] for j in size if j != i)
                times[i] = max(LEAST * common, (rest + PULL * common) / (squares[i][i] + PULL))
        self.believed = tuple(p * t for p, t in zip(self._prior, times, strict=True))


class StepPrices:
    """Of one worker's steps."""

    def __init__(self, others: Sequence["StepPrices"] = ()) -> None:
        """`others`: of the same model. Until this one has measured something it is believed as good
        as the best of them: who is believed dear is not tried, and stays so."""
        prior = list(_terms(TYPICAL))
        self._hoped: list[tuple[float, ...] | None] = []
        """What a kind is believed to cost that was never measured well."""
        for kind in range(len(_KINDS)):
            hope = self._cheapest(others, kind)
            self._hoped.append(hope)
            if hope is not None:
                for term in _KINDS[kind].terms:
                    prior[term] = hope[term]
        self._fit = Fit(prior, kinds=len(_KINDS))
        self._learnt_s = [0.0] * len(_KINDS)
        self._prompts_seen = 0
        self._best: list[tuple[float, ...] | None] = [None] * len(_KINDS)
        """The terms when a usual step of this kind cost least."""
        self._set()

    def learn(self, samples: Sequence[StepSample], now_s: float) -> None:
        self._fit.learn([(int(s.prefill_tokens > 0), _shape(s), s.elapsed_s) for s in samples])
        self._set()
        self._prompts_seen += sum(sample.prefill_tokens > 0 for sample in samples)
        for kind in {int(sample.prefill_tokens > 0) for sample in samples}:
            self._learnt_s[kind] = now_s
            best, usual = self._best[kind], _KINDS[kind].usual
            if self._fit.knows(kind) and (
                best is None or self._fit.price(usual) < _sum(best, usual)
            ):
                self._best[kind] = self.terms

    def fade(self, now_s: float) -> None:
        """To be called now and then."""
        for kind, (measured, hoped) in enumerate(zip(self._best, self._hoped, strict=True)):
            best = measured or hoped
            if best is not None and now_s - self._learnt_s[kind] >= FADE_S:
                self._learnt_s[kind] = now_s
                factors = [1.0] * len(best)
                for term in _KINDS[kind].terms:
                    factors[term] = (1.0 + best[term] / self.terms[term]) / 2
                self._fit.fade(kind, factors)
                self._set()

    @staticmethod
    def _cheapest(others: Sequence["StepPrices"], kind: int) -> tuple[float, ...] | None:
        """The terms of whoever has measured the kind and does it best."""
        known = [other.terms for other in others if other._best[kind] is not None]
        return min(known, key=lambda terms: _sum(terms, _KINDS[kind].usual), default=None)

    @property
    def knows_prompts(self) -> bool:
        """Whether enough has been measured, ever, to turn somebody away by it."""
        return self._prompts_seen >= KNOWN_WELL

    def prompt_s(self, prompt: Prompt) -> float:
        """Of the tokens alone, without the steps that they are spread over."""
        return self.token_s * prompt.tokens + self.pair_s * prompt.pairs

    def step_s(self, streams: int, context_tokens: int) -> float:
        """Of a step that decodes these and nothing else."""
        return self.base_s + self.row_s * streams + self.context_s * context_tokens

    def _set(self) -> None:
        self.terms: tuple[float, ...] = self._fit.believed
        self.base_s, self.token_s, self.pair_s, self.row_s, self.context_s = self.terms


class _Way:
    """One transport."""

    def __init__(self) -> None:
        self._fit, self._learnt_s = Fit(TYPICAL_TRANSFER), 0.0
        self._set()

    def learn(self, reads: Sequence[TransferSample], now_s: float) -> None:
        self._fit.learn([(0, (1.0, read.num_blocks), read.elapsed_s) for read in reads])
        self._learnt_s = now_s
        self._set()

    def fade(self, now_s: float) -> None:
        """Towards a typical price, if it is above: a READ that took seconds once would keep the
        transport from being used, and so from being known, for good."""
        if now_s - self._learnt_s >= FADE_S:
            self._learnt_s = now_s
            pairs = zip(TYPICAL_TRANSFER, self._fit.believed, strict=True)
            self._fit.fade(0, [(1.0 + min(1.0, usual / b)) / 2 for usual, b in pairs])
            self._set()

    def _set(self) -> None:
        self.first_s, self.block_s = self._fit.believed


class TransferPrices:
    """Of READs, by transport. Which one serves a pair is known when it has been used, for as long
    as both are there."""

    def __init__(self) -> None:
        self._there: frozenset[NodeId] = frozenset()
        self._ways: dict[str, _Way] = {}
        self._of_pair: dict[tuple[NodeId, NodeId], _Way] = {}
        self._best = _Way()

    def sync(self, node_ids: Iterable[NodeId]) -> None:
        """Who is there now."""
        there = frozenset(node_ids)
        if not self._there <= there:
            known = self._of_pair.items()
            self._of_pair = {pair: way for pair, way in known if there.issuperset(pair)}
        self._there = there

    def learn(self, reader: NodeId, samples: Sequence[TransferSample], now_s: float) -> None:
        for transport in sorted({sample.transport for sample in samples}):
            reads = [sample for sample in samples if sample.transport == transport]
            way = self._ways.setdefault(transport, _Way())
            way.learn(reads, now_s)
            for read in reads:  # of a source that has just gone, too: it has been read from
                if self._there.issuperset((reader, read.source)):
                    self._of_pair[reader, read.source] = way
        if samples:
            self._choose()

    def fade(self, now_s: float) -> None:
        """To be called now and then."""
        for way in self._ways.values():
            way.fade(now_s)
        self._choose()

    def read_s(self, reader: NodeId, source: NodeId, num_blocks: int) -> float:
        # Else the best that is known: whoever is never tried is never known.
        way = self._of_pair.get((reader, source), self._best)
        return way.first_s + way.block_s * num_blocks

    def least_s(self, num_blocks: int) -> float:
        """By the best transport that is known."""
        return self._best.first_s + self._best.block_s * num_blocks

    def _choose(self) -> None:
        # A load from a tier of its own leads to no peer.
        ways = [way for name, way in self._ways.items() if name != OWN_TIER]
        if ways:
            self._best = min(ways, key=lambda way: way.first_s + USUAL_BLOCKS * way.block_s)


def _sum(terms: Sequence[float], x: Sequence[float]) -> float:
    return sum(term * v for term, v in zip(terms, x, strict=True))


def _terms(model: StepModel) -> tuple[float, ...]:
    return (
        model.base_s,
        model.prefill_token_s,
        model.prefill_pair_s,
        model.decode_row_s,
        model.decode_context_s,
    )


def _shape(sample: StepSample) -> tuple[float, ...]:
    return (
        1.0,
        sample.prefill_tokens,
        sample.prefill_pairs,
        sample.decode_rows,
        sample.decode_context,
    )
