"""What the frontend says when it starts."""

from pathlib import Path

import pytest

from slipstream.frontend.api_keys import ApiKey, add
from slipstream.frontend.app import AppSettings
from slipstream.frontend.machine import FrontendMachine, FrontendSettings
from slipstream.frontend.service import FrontendService
from slipstream.messages import NodeInfo
from slipstream.types import Role


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
