from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.tiny import save_model

Saved = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Name of a case -> its folder and the Transformers model; each is made once."""
    made: dict[str, Saved] = {}

    def get(case: str) -> Saved:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = (folder, save_model(folder, case))
        return made[case]

    return get


@pytest.fixture(scope="session")
def copies(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], tuple[Path, Path]]:
    """Case and format of a checkpoint -> the quantized folder, and the plain one; each is made
    once."""
    from engine.quantizers import FORMATS, SIZES, quantized  # what not all need

    sources: dict[str, Path] = {}
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(case: str, form: str) -> tuple[Path, Path]:
        if case not in sources:
            sources[case] = tmp_path_factory.mktemp(case)
            experts = {f"{kind}_intermediate_size": 64 for kind in ("moe", "shared_expert")}
            save_model(sources[case], case, **SIZES, **(experts if case == "qwen2_moe" else {}))
        if (case, form) not in made:
            folder = tmp_path_factory.mktemp("quantized") / "model"
            made[case, form] = folder, quantized(sources[case], folder, FORMATS[form])
        return made[case, form]

    return get
