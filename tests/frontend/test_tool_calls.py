"""Parts become blocks, however they are cut into deltas."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from slipstream.frontend.tool_calls import Blocks, Change, call_id
from slipstream.messages import Part, PartKind, TextDelta
from slipstream.types import pack_tokens

SAID = st.sampled_from([PartKind.CONTENT, PartKind.REASONING])
CALL = [Part(PartKind.CALL, "f"), Part(PartKind.ARGUMENTS, "{"), Part(PartKind.ARGUMENTS, "}")]
PARTS = st.lists(st.one_of(st.builds(Part, SAID, st.text(max_size=3)), st.just(CALL)), max_size=12)


def delta(*parts: Part, tokens: int = 1) -> TextDelta:
    packed = pack_tokens([0] * tokens)
    return TextDelta(request_id="r", attempt=1, position=0, tokens=packed, parts=list(parts))


@given(PARTS, st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_blocks(drawn: list[Part | list[Part]], cuts: list[int]) -> None:
    parts = [part for one in drawn for part in (one if isinstance(one, list) else [one])]
    blocks, waiting, changes = Blocks("a"), iter(parts), []
    for cut in [*cuts, len(parts)]:
        changes += list(blocks.take(delta(*itertools.islice(waiting, cut))))
    changes += list(blocks.close())
    told = "".join(text for change, _, text in changes if change is Change.GREW)
    assert told == "".join(part.text for part in parts if part.kind is not PartKind.CALL)
    assert all(block.text for block in blocks.blocks)
    opened = [block for change, block, _ in changes if change is Change.OPENED]
    assert opened == blocks.blocks and [block.index for block in opened] == list(range(len(opened)))
    assert [block for change, block, _ in changes if change is Change.CLOSED] == opened
    for before, after in itertools.pairwise(opened):
        assert before.kind is not after.kind or after.kind is PartKind.CALL
    for kind in (PartKind.CONTENT, PartKind.REASONING):
        assert blocks.text(kind) == "".join(part.text for part in parts if part.kind is kind)
    calls = blocks.calls()
    assert [(one.name, one.arguments) for one in calls] == [("f", "{}")] * len(calls)
    assert len({one.id for one in calls}) == sum(part.kind is PartKind.CALL for part in parts)


def test_ids_of_calls() -> None:
    assert call_id("a", 0, 1) == call_id("a", 0, 1)
    ids = {call_id(*one) for one in itertools.product(["a", "b"], range(3), range(3))}
    assert len(ids) == 18 and all(one.startswith("call_") for one in ids)


def test_reasoning_tokens() -> None:
    """Those before the first text belong to what comes; those behind it to what is open."""
    blocks = Blocks("a")
    for one in (delta(), delta(Part(PartKind.REASONING, "x")), delta(tokens=2)):
        list(blocks.take(one))
    assert blocks.reasoning_tokens == 4
    list(blocks.take(delta(Part(PartKind.CONTENT, "y"), tokens=3)))
    assert blocks.reasoning_tokens == 4
