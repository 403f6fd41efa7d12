"""Where the clients' programs run: environments of their own, which `make clients` makes."""

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "clients"
SDK = BUILD / "sdk" / "bin" / "python"
TOOLS = BUILD / "tools" / "bin" / "python"
NODE_MODULES = BUILD / "node" / "node_modules"
VLLM = Path.home() / ".cache" / "slipstream" / "peers" / "vllm" / "bin" / "python"


def lacks_python() -> str:
    return "" if SDK.exists() and TOOLS.exists() else "no environment of clients: make clients"


def lacks_node() -> str:
    if shutil.which("node") is None:
        return "no node here"
    return "" if NODE_MODULES.is_dir() else "no packages for node: make clients, with npm"


def lacks_vllm() -> str:
    if VLLM.exists():
        return ""
    how = "python -m slipstream.loadtest.versus --install-only --peers vllm"
    return f"no environment with vLLM: {how}"


def run(command: list[str], folder: Path, timeout_s: float, **environ: str) -> str:
    """What it printed; an error with it if it failed. None of our paths lead its imports."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **quiet, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
    return done.stdout
