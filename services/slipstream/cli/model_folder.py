"""Looks at a model folder before any process starts: a broken one is one line then, and not six."""

import json
from pathlib import Path
from typing import Any

from slipstream.cli.model_error import ModelError

_HEADER_BYTES_MAX = 100 * 2**20
"""Safetensors' own limit for its header."""
_FOLDER = "a model's folder has config.json, tokenizer.json and safetensors"


def check_folder(folder: Path, weights: bool = True) -> None:
    """ModelError, naming the file, unless there are a config, a tokenizer and, if they are wanted,
    whole weights."""
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'}: model_type is missing")
    _read_json(folder / "tokenizer.json")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _read_json(folder / name)
    for file in _weight_files(folder) if weights else ():
        _check_safetensors(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: {name} is not a file name")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; {_FOLDER}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return document


def _check_safetensors(path: Path) -> None:
    """The header is readable and the file is exactly as long as it says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER_BYTES_MAX:
                raise ModelError(f"{path}: not a safetensors file")
            header = json.loads(file.read(length))
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; {_FOLDER}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: its safetensors header is damaged") from None
    try:
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise ModelError(f"{path}: its safetensors header is damaged") from None
    if size != expected:
        raise ModelError(f"{path}: {size} bytes instead of {expected}; copy or download it again")
