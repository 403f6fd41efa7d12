"""Traces: read, refused, spread, cut, drawn."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.builders import request
from slipstream.config import SetupError
from slipstream.simulate.synthetic import synthetic_trace
from slipstream.simulate.trace import (
    CHUNK_TOKENS,
    TraceRequest,
    cut,
    read_trace,
    reusable_blocks,
    scaled,
    spread,
)

GOOD = '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


def written(folder: Path, *lines: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_reads_requests_by_arrival_from_zero(tmp_path: Path) -> None:
    later = GOOD.replace("3000", "4500")
    found = read_trace(written(tmp_path, later, "", GOOD, ""))
    assert found == [request(0.0, 600, 5, 1, 2), request(1.5, 600, 5, 1, 2)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not a JSON object: "),
        ("\xff", "not a JSON object: "),
        ("[]", "expected `object`, got `array`"),
        ("{}", "object missing required field `timestamp`"),
        (GOOD.replace("3000", "-1"), "timestamp: expected `float` >= 0.0, got -1"),
        (GOOD.replace("3000", "1e400"), "timestamp: number out of range, got 1e400"),
        (GOOD.replace("600", '"x"'), 'input_length: expected `int`, got `str`, got "x"'),
        (GOOD.replace("600", "0"), "input_length: expected `int` >= 1, got 0"),
        (GOOD.replace("5,", "99999999,"), "output_length: expected `int` <= 16777216, got 9999999"),
        (GOOD.replace("[1, 2]", "[1, -2]"), "hash_ids: expected `int` >= 0, got [1, -2]"),
        (
            GOOD.replace("[1, 2]", "[1]"),
            "hash_ids: 1 ids for input_length 600; one for each 512 tokens makes 2",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line.encode("latin-1"))
    with pytest.raises(SetupError) as caught:
        read_trace(path)
    assert f"{path}:2: {complaint}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_trace_at_all(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(SetupError, match="holds no request"):
        read_trace(written(tmp_path, "\n"))


def test_spread_draws_between_a_stamp_and_the_next() -> None:
    stamped = [request(t, 16, 1, n) for n, t in enumerate([0.0] * 9 + [3.0] * 5 + [6.0])]
    drawn = spread(stamped, seed=1)
    times_s = [r.arrival_s for r in drawn]
    assert times_s == sorted(times_s) and len(set(times_s)) == 15
    assert [r.chunks for r in drawn] == [r.chunks for r in stamped]
    assert [r.arrival_s // 3 * 3 for r in drawn] == [r.arrival_s for r in stamped]
    assert drawn == spread(stamped, seed=1) != spread(stamped, seed=2)


def test_scaled_and_cut() -> None:
    requests = [request(float(t), 16, 1, t) for t in range(10)]
    assert [r.arrival_s for r in scaled(requests, 4.0)] == [t / 4 for t in range(10)]
    assert cut(requests, 3, 0.0) == requests[:3]
    assert cut(requests, 0, 2.5) == requests[:3]
    assert cut(requests, 0, 0.0) == requests


def blocks_of(one: TraceRequest) -> list[tuple[int, ...]]:
    """Each full block of a prompt, by all that decides its contents: the ids up to it."""
    return [
        (*one.chunks[: end // CHUNK_TOKENS + 1], end)
        for end in range(15, one.prompt_tokens - one.prompt_tokens % 16, 16)
    ]


CHUNK_LISTS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(st.lists(st.tuples(CHUNK_LISTS, st.integers(1, CHUNK_TOKENS)), min_size=1, max_size=12))
def test_reusable_blocks_equals_counting_them(drawn: list[tuple[list[int], int]]) -> None:
    requests = [
        request(0.0, (len(chunks) - 1) * CHUNK_TOKENS + tail, 1, *chunks) for chunks, tail in drawn
    ]
    seen: set[tuple[int, ...]] = set()
    hits = total = 0
    for one in requests:
        blocks = blocks_of(one)
        run = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        hits += min(run, (one.prompt_tokens - 1) // 16)
        total += len(blocks)
        seen.update(blocks)
    assert reusable_blocks(requests) == (hits, total)


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_trace_has_the_form_of_a_real_one(seed: int) -> None:
    requests = synthetic_trace(400, seed)
    assert requests == synthetic_trace(400, seed) != synthetic_trace(400, seed + 1)
    assert len(requests) == 400
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    before: dict[int, int | None] = {}
    for one in requests:
        assert len(one.chunks) == -(-one.prompt_tokens // CHUNK_TOKENS)
        for parent, chunk in zip((None, *one.chunks), one.chunks, strict=False):
            assert before.setdefault(chunk, parent) == parent
    hits, total = reusable_blocks(requests)
    assert 0.2 < hits / total < 0.9
