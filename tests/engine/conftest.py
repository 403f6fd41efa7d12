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
