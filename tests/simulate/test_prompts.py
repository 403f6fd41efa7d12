"""Prompts from chunk ids: what hashes say about them is what the chunks say."""

from hypothesis import given
from hypothesis import strategies as st

from simulate.builders import request
from slipstream.core.prefix import block_hashes, namespace, split_hashes
from slipstream.simulate.cluster import LAYOUT_ID
from slipstream.simulate.prompts import Prompts
from slipstream.simulate.trace import CHUNK_ID_MAX, CHUNK_TOKENS
from slipstream.types import unpack_tokens

VOCAB = 1 << 17
CHUNKS = st.lists(st.sampled_from([0, 1, 2, VOCAB - 2, VOCAB - 1, CHUNK_ID_MAX]), min_size=1)


@given(CHUNKS, st.integers(1, CHUNK_TOKENS))
def test_hashes_are_those_of_the_tokens(chunks: list[int], tail: int) -> None:
    one = request(0.0, (len(chunks) - 1) * CHUNK_TOKENS + tail, 1, *chunks)
    prompts = Prompts(VOCAB, LAYOUT_ID)
    for _ in range(2):  # the second time from the cache of chains
        tokens = unpack_tokens(prompts.packed(one))
        assert len(tokens) == one.prompt_tokens
        assert min(tokens) >= 0 and max(tokens) < VOCAB - 1
        expected = block_hashes(tokens, namespace(LAYOUT_ID, ""))
        assert split_hashes(prompts.hashes(one)) == expected


@given(CHUNKS, CHUNKS)
def test_prompts_are_equal_as_far_as_their_chunks_are(one: list[int], other: list[int]) -> None:
    prompts = Prompts(VOCAB, LAYOUT_ID)
    first, second = (
        split_hashes(prompts.hashes(request(0.0, len(chunks) * CHUNK_TOKENS, 1, *chunks)))
        for chunks in (one, other)
    )
    shared = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    pairs = list(zip(first, second, strict=False))
    assert [a == b for a, b in pairs] == [i < shared * 32 for i in range(len(pairs))]
