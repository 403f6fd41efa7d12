"""What a model's makers recommend."""

from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.tokenizer.recommended import recommended_sampling


def test_default_sampling(tmp_path: Path) -> None:
    assert recommended_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.2, "top_p": 0.9, "top_k": -1, "eos_token_id": 2}')
    assert recommended_sampling(tmp_path) == {"temperature": 0.2, "top_p": 0.9, "top_k": -1}


@pytest.mark.parametrize("content", ["{", '{"temperature": 3}', '{"top_k": 1.5}', '{"top_p": "x"}'])
def test_defaults_that_nobody_could_be_served_with(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(StartError, match=r"generation_config\.json") as raised:
        recommended_sampling(tmp_path)
    assert raised.value.exit_code == 4
