"""Which launch a card takes for a shape: the nearest that was measured, else the usual one."""

import json
from pathlib import Path

import pytest

from slipstream.kernels.gpu.tuning import USUAL, Entries, Tuning, file_of, read, write

FIRST, SECOND = USUAL["splits"][:2]


def entries() -> Entries:
    def of(rows: int, head_dim: int, launch: dict[str, int]) -> dict[str, dict[str, int]]:
        return {"shape": {"rows": rows, "head_dim": head_dim}, "launch": launch}

    return {"splits": [of(1, 128, FIRST), of(64, 128, SECOND), of(64, 64, FIRST)]}


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"rows": 1, "head_dim": 128}, FIRST),
        ({"rows": 7, "head_dim": 128}, FIRST),  # by factors: 7 times 1, 9 times less than 64
        ({"rows": 9, "head_dim": 128}, SECOND),
        ({"rows": 500, "head_dim": 96}, SECOND),
        ({"rows": 500, "head_dim": 64}, FIRST),
        ({"rows": 64, "head_dim": 128, "group": 5}, SECOND),  # what was not told apart is no matter
    ],
)
def test_the_nearest_shape_by_factors(shape: dict[str, int], wanted: dict[str, int]) -> None:
    assert Tuning(entries(), 132).choose("splits", **shape) == wanted


def test_without_a_file_the_first_of_the_usual_ones() -> None:
    tuning = Tuning({}, 132)
    for kernel, launches in USUAL.items():
        chosen = tuning.choose(kernel, head_dim=64)
        assert chosen == launches[0]
        chosen.clear()  # a copy
        assert tuning.choose(kernel, head_dim=64) == launches[0]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    path = write("NVIDIA H200", entries(), folder)
    assert path == folder / "NVIDIA_H200.json" == file_of("NVIDIA H200", folder)
    assert read("NVIDIA H200", folder) == entries()
    assert read("another card", tmp_path) == {}


@pytest.mark.parametrize(
    ("kernel", "shape", "launch"),
    [
        ("chunks", {"tokens": 1}, {"M": 128}),
        ("gemm", {"tokens": 1}, FIRST),
        ("splits", {"rows": 0}, FIRST),
    ],
)
def test_a_file_of_other_kernels_is_refused(
    tmp_path: Path, kernel: str, shape: dict[str, int], launch: dict[str, int]
) -> None:
    entry = {"shape": shape, "launch": launch}
    file_of("card", tmp_path).write_text(json.dumps({kernel: [entry]}))
    with pytest.raises(ValueError, match=rf"{kernel}.*`tune` writes it anew"):
        read("card", tmp_path)
