"""What the frontend reads of a model folder, and says when it starts."""

from pathlib import Path

import pytest

from slipstream.config import StartError
from slipstream.frontend.__main__ import default_sampling
from slipstream.frontend.api_keys import ApiKey, add
from slipstream.frontend.app import AppSettings
from slipstream.frontend.machine import FrontendMachine, FrontendSettings
from slipstream.frontend.service import FrontendService
from slipstream.messages import NodeInfo
from slipstream.types import Role


def test_default_sampling(tmp_path: Path) -> None:
    assert default_sampling("") == {}
    assert default_sampling(str(tmp_path)) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.2, "top_p": 0.9, "top_k": -1, "eos_token_id": 2}')
    assert default_sampling(str(tmp_path)) == {"temperature": 0.2, "top_p": 0.9, "top_k": -1}


@pytest.mark.parametrize("content", ["{", '{"temperature": 3}', '{"top_k": 1.5}', '{"top_p": "x"}'])
def test_defaults_that_nobody_could_be_served_with(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(StartError, match=r"generation_config\.json") as raised:
        default_sampling(str(tmp_path))
    assert raised.value.exit_code == 4


@pytest.mark.parametrize(
    ("host", "asks", "warns"),
    [("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False)],
)
async def test_a_door_that_stands_open_is_said_to(
    host: str, asks: bool, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys.toml"
    add(keys, ApiKey(name="alice", sha256="0" * 64))
    node = NodeInfo(node_id="frontend-0", role=Role.FRONTEND, epoch=1, address="a")
    machine = FrontendMachine(node, FrontendSettings())
    settings = AppSettings(api_keys_file=str(keys) if asks else "")
    service = FrontendService(machine, settings, host, 0)
    await service.start(lambda event: None)
    await service.close()
    assert ("no --api-keys-file is given" in caplog.text) is warns
