"""KV blocks in a card's memory: copied between pools and buffers, and digested on the way.

The digest is that of `kernels.verified_copy`, XXH3-128, so both ends of a transfer compare the same
16 bytes wherever they are. It is made for one pass along the bytes, yet all but a chain of one step
for each 1024 bytes is a sum: `_segments` has as many programs as the memory needs and writes 64
bytes a segment, `_chain` goes through those.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

STRIPE_BYTES, SEGMENT_BYTES = 64, 1024
SHORTEST_BYTES = 241
"""Shorter inputs have another algorithm."""
_SEGMENTS_AT_A_TIME = 8
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_LAST_STRIPE = 24
_HIGH, _LOW = 32, 40
"""Where in `_keys` what is not a multiple of 8 bytes into the secret begins."""
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_STARTS = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)
_START = 48
_WORD = (1 << 64) - 1


@triton.jit
def _segments(
    source, source_rows, target, target_rows, sums, keys, words, segments,
    COPY: tl.constexpr, DIGEST: tl.constexpr, AT_A_TIME: tl.constexpr,
    LAST_STRIPE: tl.constexpr,
):  # fmt: skip
    """Some segments of one block: copied, and what their stripes add to the eight lanes summed.

    sums: `[blocks, segments, 8]`; the last stripe of a block has a key of its own.
    """
    block = tl.program_id(0)
    segment = tl.program_id(1) * AT_A_TIME + tl.arange(0, AT_A_TIME)[:, None, None]
    stripe = tl.arange(0, 16)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    word = (segment * 16 + stripe) * 8 + lane
    there = word < words
    begin = source + tl.load(source_rows + block) * words
    data = tl.load(begin + word, mask=there, other=0)
    if COPY:
        tl.store(target + tl.load(target_rows + block) * words + word, data, mask=there)
    if DIGEST:
        other = tl.load(begin + (word ^ 1), mask=there, other=0).to(tl.uint64, bitcast=True)
        is_last = (segment * 16 + stripe + 1) * 8 >= words
        key = tl.load(keys + tl.where(is_last, LAST_STRIPE, stripe) + lane)
        mixed = data.to(tl.uint64, bitcast=True) ^ key.to(tl.uint64, bitcast=True)
        added = other + (mixed & 0xFFFFFFFF) * (mixed >> 32)
        added = tl.sum(tl.where(there, added, 0), 1)
        row = block.to(tl.int64) * segments + tl.program_id(1) * AT_A_TIME
        row = row + tl.arange(0, AT_A_TIME)[:, None]
        inside = tl.program_id(1) * AT_A_TIME + tl.arange(0, AT_A_TIME)[:, None] < segments
        at = sums + row * 8 + tl.arange(0, 8)[None, :]
        tl.store(at, added.to(tl.int64, bitcast=True), mask=inside)


@triton.jit
def _word(keys, index):
    return tl.load(keys + index).to(tl.uint64, bitcast=True)


@triton.jit
def _scrambled(lanes, added, secret):
    """The lanes behind a whole segment."""
    lanes += added
    return (lanes ^ (lanes >> 47) ^ secret) * 0x9E3779B1


@triton.jit
def _merged(even, odd, keys, first, start):
    pair = tl.arange(0, 4) * 2
    left = even ^ _word(keys, first + pair)
    right = odd ^ _word(keys, first + pair + 1)
    start += tl.sum((left * right) ^ tl.umulhi(left, right), 0)
    start ^= start >> 37
    start *= 0x165667919E3779F9
    return start ^ (start >> 32)


@triton.jit
def _chain(
    sums, keys, starts, out, segments,
    UNROLLED: tl.constexpr, START: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The digest of one block out of its segments' sums: high and low word.

    A step waits for the one before, not so what it adds: unrolled, many loads are on their way.
    """
    block = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, 4) * 2
    even, odd = _word(keys, START + pair), _word(keys, START + pair + 1)
    secret_even, secret_odd = _word(keys, 16 + pair), _word(keys, 17 + pair)
    at = sums + block * segments * 8 + pair
    whole = segments - 1
    unrolled = whole // UNROLLED * UNROLLED
    for first in range(0, unrolled, UNROLLED):
        for step in tl.static_range(UNROLLED):
            added = at + (first + step) * 8
            even = _scrambled(even, _word(added, 0), secret_even)
            odd = _scrambled(odd, _word(added, 1), secret_odd)
    for segment in range(unrolled, whole):
        even = _scrambled(even, _word(at + segment * 8, 0), secret_even)
        odd = _scrambled(odd, _word(at + segment * 8, 1), secret_odd)
    even += _word(at + whole * 8, 0)
    odd += _word(at + whole * 8, 1)
    high = _merged(even, odd, keys, HIGH, _word(starts, 0))
    low = _merged(even, odd, keys, LOW, _word(starts, 1))
    tl.store(out + block * 2, high.to(tl.int64, bitcast=True))
    tl.store(out + block * 2 + 1, low.to(tl.int64, bitcast=True))


def _signed(words: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(words, np.uint64).view(np.int64))


@functools.cache
def _keys(device: torch.device) -> Tensor:
    """int64: the secret's words, then those at the offsets that are no multiple of 8, then the
    lanes' first values."""
    offsets = [*range(0, 192, 8)]
    for begin in (192 - 64 - 7, 192 - 64 - 11, 11):
        offsets += range(begin, begin + 64, 8)
    words = [int.from_bytes(_SECRET[at : at + 8], "little") for at in offsets]
    return _signed([*words, *_STARTS]).to(device)


def verified_copy(
    source: Tensor,
    source_rows: Sequence[int],
    target: Tensor | None,
    target_rows: Sequence[int],
    digest: bool,
) -> Tensor | None:
    """Copies rows of `source` into rows of `target`, both uint8 `[rows, bytes]`, contiguous, on
    cards that reach each other; `target` None: digests alone.

    Returns int64 `[count, 2]`, the digest of each row as it was stored, in words (`digest_bytes`);
    None without `digest`. The caller waits for the stream. IndexError: no such row. ValueError: a
    row is shorter than `SHORTEST_BYTES` or no multiple of `STRIPE_BYTES`.
    """
    count, num_bytes, device = len(source_rows), source.shape[1], source.device
    if num_bytes < SHORTEST_BYTES or num_bytes % STRIPE_BYTES:
        raise ValueError(f"rows of {num_bytes} bytes; blocks are longer, in stripes of 64")
    if target is not None and (target.shape[1] != num_bytes or len(target_rows) != count):
        raise ValueError(f"{count} rows {source.shape} -> {len(target_rows)} rows {target.shape}")
    words, segments = num_bytes // 8, (num_bytes - 1) // SEGMENT_BYTES + 1
    if not count:
        return torch.empty(0, 2, dtype=torch.int64, device=device) if digest else None
    pairs = [_checked(source_rows, source)]
    pairs.append(pairs[0] if target is None else _checked(target_rows, target))
    # Pinned memory would be worth it for many calls a second; there are as many as steps.
    from_rows, to_rows = torch.tensor(pairs, dtype=torch.int64).to(device).unbind(0)
    from_words = _words(source)
    to_words = from_words if target is None else _words(target)
    keys = _keys(device)
    sums = torch.empty(count if digest else 1, segments, 8, dtype=torch.int64, device=device)
    _segments[(count, triton.cdiv(segments, _SEGMENTS_AT_A_TIME))](
        *(from_words, from_rows, to_words, to_rows, sums, keys, words, segments),
        COPY=target is not None,
        DIGEST=digest,
        AT_A_TIME=_SEGMENTS_AT_A_TIME,
        LAST_STRIPE=_LAST_STRIPE,
        num_warps=4,
    )
    if not digest:
        return None
    starts = [~(num_bytes * _P64_2) & _WORD, num_bytes * _P64_1 & _WORD]
    out = torch.empty(count, 2, dtype=torch.int64, device=device)
    _chain[(count,)](
        *(sums, keys, _signed(starts).to(device), out, segments),
        UNROLLED=16,
        START=_START,
        HIGH=_HIGH,
        LOW=_LOW,
        num_warps=1,
    )
    return out


def digest_bytes(words: Tensor) -> tuple[bytes, ...]:
    """Of what `verified_copy` returned, 16 bytes each, as `kernels.verified_copy` has them."""
    packed = words.cpu().numpy().astype(">i8").tobytes()
    return tuple(packed[at : at + 16] for at in range(0, len(packed), 16))


def digests(source: Tensor, rows: Sequence[int]) -> tuple[bytes, ...]:
    """The XXH3-128 of each row of uint8 `[rows, bytes]`; it waits for them."""
    words = verified_copy(source, rows, None, (), True)
    assert words is not None
    return digest_bytes(words)


def _words(blocks: Tensor) -> Tensor:
    assert blocks.is_contiguous() and blocks.dtype == torch.uint8
    return blocks.view(torch.int64)


def _checked(rows: Sequence[int], blocks: Tensor) -> list[int]:
    if rows and (min(rows) < 0 or max(rows) >= len(blocks)):
        raise IndexError(f"no such row in {len(blocks)}: {min(rows)} .. {max(rows)}")
    return list(rows)
