"""What a model is written in: a handful of operations, each with one meaning and several makers.

`reference` computes them at once in plain torch; that is the specification, and what serves where
nothing faster does. `program` writes them down once and has them run by compiled kernels; `gpu` has
Triton's. Tensors are float32 or bfloat16 throughout; sums are float32, and each result is rounded
once. The pool may be float8 instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from slipstream.kernels.draw import Draw, Drawn
from slipstream.kernels.levels import Levels

Value: TypeAlias = Any
"""What an operation yields: a tensor, or the promise of one; rows are tokens or samples."""
Weights: TypeAlias = Any
"""A matrix as its backend wants it."""
OwnAdapters: TypeAlias = Any
"""`Adapters` that the same backend made."""
Quantization: TypeAlias = Literal["none", "int8", "fp8"]
"""What matrices that are multiplied with are made into."""
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
NO_SLOT = -1
"""Of a row of padding: nothing is written for it."""
NO_ADAPTER = -1
"""Of a token that wants none."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Rows one after another; T tokens, R rows, S of them sample.

    A row of padding has one token, the slot `NO_SLOT` and a context of 0: it is computed like any
    other, its attention is 0, and the pool does not see it. Only graphs on a GPU need such rows;
    the reference takes them, the CPU program is not given any.
    """

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T], from 0 at the beginning of each request"""
    slots: Tensor
    """int64 [T]: where each token's key and value go, block id * BLOCK_TOKENS + offset"""
    block_tables: Tensor
    """int32 [R, longest table], padded with 0"""
    query_starts: Tensor
    """int32 [R + 1]: a row's tokens are query_starts[r] .. query_starts[r + 1]"""
    context_lengths: Tensor
    """int32 [R]: tokens of the request after this step"""
    sample_indices: Tensor
    """int64 [S]: last token of each row that samples"""
    adapters: Tensor | None = None
    """int32 [T]: the place of each token's adapter, or `NO_ADAPTER`; None: nobody wants any"""


def rotation_block(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of float32 rows `[rows, dim]`, in blocks of `rotation_block`.

    It is its own inverse up to the factor `rotation_block(dim)`: products of two rows grow by it.
    """
    rows, dim = x.shape
    half = 1
    while half < rotation_block(dim):
        first, second = x.view(rows, dim // (2 * half), 2, half).unbind(2)
        x = torch.stack((first + second, first - second), 2).view(rows, dim)
        half *= 2
    return x


def quantize(x: Tensor, turned: bool = True) -> tuple[Tensor, Tensor]:
    """Rows of `[rows, dim]`, rotated, as int8, and their scales, float32 `[rows, 1]`.

    Inputs of a model's matrices have a few large channels, for which all others would be rounded
    coarsely. `hadamard` spreads them over their blocks first; weights are rotated alike, and the
    product comes out the same. Not `turned`: they are not rotated, for weights that were made int8
    by others.
    Source: Ashkboos et al., "QuaRot", 2024.
    """
    wide = hadamard(x.float()) if turned else x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (wide * (1 / scale)).round().to(torch.int8), scale


def quantize_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `[rows, dim]` as float8, the largest of each as float8's largest, and their scales,
    float32 `[rows, 1]`.

    Nothing is rotated: what float8 rounds off is a share of each number, not of the largest one.
    """
    wide = x.float()
    scale = scale_of(wide)
    return stored(wide / scale, FLOAT8), scale


def fitted_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_float8`, with the scale of an octave that loses least of each row.

    Steps of float8 double with each power of two: where those lie among a row's numbers is what a
    scale decides. Worth its time once, for weights.
    """
    wide = weight.float()
    levels, scale = quantize_float8(wide)
    least = (levels.float() * scale - wide).square().sum(1, keepdim=True)
    for eighth in range(1, 8):
        other = scale_of(wide) * 2 ** (eighth / 8)
        made = stored(wide / other, FLOAT8).float()
        lost = (made * other - wide).square().sum(1, keepdim=True)
        better = lost < least
        levels = torch.where(better, made, levels.float()).to(FLOAT8)
        scale, least = torch.where(better, other, scale), torch.where(better, lost, least)
    return levels, scale


def scale_of(wide: Tensor) -> Tensor:
    """float32 `[rows, 1]` by which a row's largest number is float8's largest."""
    return wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / FLOAT8_MAX


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the pool's dtype; what float8 cannot hold becomes its largest number."""
    return (x.float().clamp(-FLOAT8_MAX, FLOAT8_MAX) if dtype == FLOAT8 else x).to(dtype)


def has_float8(device: torch.device) -> bool:
    """Whether its kernels can read and write float8."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def keys_turned(x: Tensor) -> Tensor:
    """Keys, or queries, `[..., dim]` float32, as they meet in a float8 pool: both halves turned by
    `hadamard`, which leaves their products what they are.

    Some channels of keys and queries are large together, and what is rounded off there is most of
    what is rounded off at all; turned, no channel stands out.
    """
    half = x.shape[-1] // 2
    turned = hadamard(x.reshape(-1, half)).view(x.shape)
    return turned / math.sqrt(rotation_block(half))


VALUE_LIFT = 8.0
"""Values of some layers are so small that float8 has few bits for them."""


class Heads(NamedTuple):
    """Query head h reads KV head h // (query / kv)."""

    query: int
    kv: int
    dim: int


class Experts(NamedTuple):
    """Of one layer, those that this process has: `count` of them, from number `first` on."""

    router: Tensor
    """[all experts, hidden]"""
    gate_up: Tensor
    """[count, 2 * intermediate, hidden]"""
    down: Tensor
    """[count, hidden, intermediate]"""
    first: int
    top_k: int
    normalized: bool
    """Do the weights of a token's experts add up to 1?"""
    shared: "SharedExpert | None" = None


class SharedExpert(NamedTuple):
    """Of all tokens."""

    gate_up: Tensor
    down: Tensor
    gate: Tensor
    """[1, hidden]: the sigmoid of this product is its weight"""


class Scoring(NamedTuple):
    """What attention does with a score, beside what all causal attention does."""

    scale: float
    window: int = 0
    """A query sees the last so many tokens, itself among them; 0: all."""
    chunk: int = 0
    """A query sees only its own one of the context's pieces of this length; 0: there are none."""
    softcap: float = 0.0
    """Scores are bent to stay below it: `cap * tanh(score / cap)`; 0: they are not."""
    sinks: Tensor | None = None
    """`[query heads]`: one more score for each head, of nothing, that takes its share of weight."""


class LowRank(NamedTuple):
    """What an adapter adds to the outputs of one matrix: `scale * (x @ down.T) @ up.T`, for each of
    the parts that lie in the matrix one under the other.
    Source: Hu et al., "LoRA", 2021.
    """

    down: Tensor
    """`[parts * rank, in]`; parts of a lower rank are filled up with zeros"""
    up: Tensor
    """`[out, rank]`"""
    scale: Tensor
    """float32 `[parts]`"""

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self)


class PackedLowRank(Protocol):
    @property
    def num_bytes(self) -> int: ...


class Adapters(Protocol):
    """What every adapter adds to one matrix: places, some of them taken."""

    def pack(self, low: LowRank) -> PackedLowRank:
        """As the backend wants it, on its device. Any thread."""

    def put(self, place: int, packed: Any | None) -> None:
        """For the tokens of the next steps; None: they add nothing there."""


class Ops(Protocol):
    """One step of one batch; `model(ops)` says what is computed, and yields the logits."""

    def embed(self, table: Weights) -> Value:
        """Rows of a packed `[vocab, hidden]` by the batch's tokens: `[T, hidden]`."""

    def take(self, x: Value) -> Value:
        """The rows that sample: `[T, dim]` -> `[S, dim]`. Behind it `adapters` are those of
        samples."""

    def rms_norm(
        self, x: Value, weight: Tensor, epsilon: float, residual: Value | None = None
    ) -> Value:
        """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension, as a new value.

        With `residual` x is added to it in place first, and the sum is normalised. The result is
        rounded before the weight is applied, as in Llama.
        Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
        """

    def linear(
        self, x: Value, weights: Weights, wide: bool = False, adapters: OwnAdapters | None = None
    ) -> Value:
        """`x @ weight.T + bias`; `wide`: float32, not rounded. With `adapters` each token's own one
        adds to its row what it makes of x, in float32; rows of others are what they are without.
        """

    def gated(self, x: Value, weights: Weights, adapters: OwnAdapters | None = None) -> Value:
        """`silu(x @ gate.T) * (x @ up.T)` of what `pack_gated` packed; `adapters` add to both
        products, their parts.

        Source: Shazeer, "GLU Variants Improve Transformer", 2020.
        """

    def moe(self, x: Value, experts: Experts) -> Value:
        """What the experts of each token say, weighted: a softmax over all experts, of which the
        `top_k` largest count. Of a token whose experts are elsewhere: nothing, zeros.
        Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; Jiang et al., "Mixtral
        of Experts", 2024.
        """

    def attention(
        self,
        qkv: Value,
        heads: Heads,
        layer: int,
        norms: tuple[Tensor, Tensor] | None,
        epsilon: float,
    ) -> Value:
        """Causal attention over KV blocks, read where they lie, of packed `[query | key | value]`.

        Queries and keys are normalised by `norms` if there are some, and rotated in place by each
        token's angles: dimension i pairs with i + dim / 2, as in checkpoints of Hugging Face. Keys
        and values are written to the batch's slots; then each query attends to its request's
        context up to itself, scaled by dim ** -0.5. Slots beyond a context may hold anything, NaN
        too. In a float8 pool keys, and the queries with them, are `keys_turned`, and
        values times `VALUE_LIFT`. Returns `[T, query * dim]`.
        Source: Su et al., "RoFormer", 2021; Kwon et al., "PagedAttention", 2023; online softmax:
        Dao et al., "FlashAttention", 2022.
        """


Model: TypeAlias = Callable[[Ops], Value]
Forward: TypeAlias = Callable[[ForwardBatch, Tensor, Tensor, Tensor], Tensor]
"""Of a batch, cosine and sine (float32 `[T, head_dim / 2]`) and the pool: the model's result.

The pool is `[blocks, layers, 2, kv_heads, block_tokens, head_dim]` in the weights' dtype, or
`FLOAT8`.
"""


@runtime_checkable
class Prepared(Protocol):
    """A `Forward` that has something to make before its first step."""

    def prepare(self, pool: Tensor, head_dim: int, rows: int) -> None:
        """What steps of up to `rows` would wait for; the pool stays as it is."""


class Backend(Protocol):
    """A maker of the operations, with its own form of weights.

    With `int8` matrices that are multiplied with go through `quantize`, one scale for each output,
    and what they are multiplied with as well, one scale for each row, at each step; with `fp8`
    through `fitted_float8` and `quantize_float8`. `Levels` are quantized already, whatever
    `quantization` says: they stay what they are, or become plain.
    """

    quantization: Quantization

    def table(self, weight: Tensor) -> Weights:
        """`[vocab, dim]` for `embed`, and for `linear` as it is."""

    def pack(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Weights:
        """`[out, in]` and `[out]`. The tensors are not needed any more."""

    def pack_gated(self, weight: Tensor | Levels, bias: Tensor | None = None) -> Weights:
        """`[gate | up]`, one under the other."""

    def adapters(
        self, parts: Sequence[int], inputs: int, places: int, rank: int, gated: bool = False
    ) -> Adapters:
        """For a matrix `[sum(parts), inputs]`: room for `places` adapters of up to `rank`. `gated`:
        of one that `pack_gated` packed, whose parts are gate and up."""

    def compile(self, model: Model) -> Forward:
        """`model` is called now, or at each step; what it does must not depend on which."""

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Sequence[Drawn]:
        """A token for each draw, out of float32 `[rows, vocab]`; see `draw`."""

    def draw_async(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The same, left where the logits are and not waited for: tokens, int64 `[draws]`, each of
        them in the vocabulary whatever the logits are, and tops, float32 `[draws]`."""
