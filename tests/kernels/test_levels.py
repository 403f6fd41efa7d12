"""Levels: packed and unpacked, cut, and put under each other; always what they were plain."""

import pytest
import torch

from slipstream.kernels.drawn import Shapes
from slipstream.kernels.levels import in_nibbles, of_nibbles, together
from slipstream.kernels.ops import FLOAT8

SEEDS = range(40)


def drawn(seed: int, inputs: int = 0) -> tuple[Shapes, int]:
    shapes = Shapes(seed, torch.float32)
    return shapes, inputs or shapes.size()


@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 31, 32, 33, 96, 100])
def test_what_is_packed_is_unpacked(inputs: int) -> None:
    levels = torch.randint(0, 16, (5, inputs), dtype=torch.uint8)
    packed = in_nibbles(levels)
    assert packed.shape == (5, -(-inputs // 32) * 16)
    assert torch.equal(of_nibbles(packed, inputs), levels.float())


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_is_scale_times_level_less_zero(seed: int) -> None:
    shapes, inputs = drawn(seed)
    levels = shapes.levels(17, inputs)
    plain = levels.plain()
    wide = (
        of_nibbles(levels.levels, inputs) if levels.bits == 4 else levels.levels.float()
    ).tolist()
    middle = 8 if levels.bits == 4 else 0
    for row, column in ((0, 0), (16, inputs - 1), (9, inputs // 3)):
        group = column // levels.group
        zero = middle if levels.zero is None else int(levels.zero[row, group])
        wanted = (wide[row][column] - zero) * float(levels.scale[row, group])
        place = column if levels.order is None else int(levels.order[column])
        assert float(plain[row, place]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_is_plain_what_it_was_of_the_whole(seed: int) -> None:
    shapes, inputs = drawn(seed)
    levels = shapes.levels(48, inputs)
    plain = levels.plain()
    assert torch.equal(levels.of_outputs(slice(16, 40)).plain(), plain[16:40])
    order = torch.randperm(48)
    assert torch.equal(levels.of_outputs(order).plain(), plain[order])
    for cut in (slice(0, inputs // 2), slice(inputs // 2, inputs), slice(inputs // 4, inputs)):
        part = levels.of_inputs(cut)
        assert part is None or torch.equal(part.plain(), plain[:, cut])
        if levels.order is None and cut.start % levels.group == 0 and cut.start % 32 == 0:
            assert part is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_one_kind_are_put_together(seed: int) -> None:
    shapes, inputs = drawn(seed)
    levels = shapes.levels(48, inputs)
    parts = [levels.of_outputs(slice(*cut)) for cut in ((0, 16), (16, 17), (17, 48))]
    whole = together(parts)
    assert whole is not None and torch.equal(whole.plain(), levels.plain())


def test_parts_of_two_kinds_are_not() -> None:
    kinds = {}
    for seed in SEEDS:
        shapes, inputs = drawn(seed, inputs=64)
        levels = shapes.levels(16, inputs)
        kind = levels.levels.dtype, levels.group, levels.zero is None
        kinds[*kind, levels.order is None] = levels
        if levels.order is not None:
            assert together([levels, shapes.levels(16, inputs)]) is None
    assert len(kinds) > 10 and FLOAT8 in {kind[0] for kind in kinds}
    for one, levels in kinds.items():
        for other, more in kinds.items():
            if one != other:
                assert together([levels, more]) is None
