"""Packed weights in a file that every worker of a host maps: packed once, in memory once.

    magic | digest, 16 bytes | length of the header, 8 | header, JSON | tensors, 64-byte aligned

The name says what is in it: model files, dtype, quantization, and the source of all that packs. The
digest (XXH3-128) is over everything behind it, and is held against the bytes before any is used. A
file gets its name when it is whole, is never written again, and a mapped one may be removed.
"""

import hashlib
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest

from slipstream.config import format_bytes
from slipstream.engine import checkpoint, decoder, quantized_config, quantized_tensors, weights
from slipstream.engine.decoder import DecoderWeights, LayerWeights
from slipstream.engine.model_config import ModelConfig, weight_files
from slipstream.kernels import levels, ops, panels, program
from slipstream.kernels.ops import Quantization
from slipstream.kernels.panels import Packed

FILES_MAX = 4
"""Of one folder; those that were not used for longest go."""
_MAGIC = b"slipstream packed weights\n"
_DIGEST, _ALIGNED = 16, 64
_PREFIX = len(_MAGIC) + _DIGEST + 8
_TYPES = {each.__name__: each for each in (DecoderWeights, LayerWeights, Packed)}
_SOURCES = (
    *(decoder.__file__, weights.__file__, checkpoint.__file__),
    *(quantized_config.__file__, quantized_tensors.__file__),
    *(levels.__file__, ops.__file__, panels.__file__, program.__file__, __file__),
)
_LOG = logging.getLogger(__name__)


class _Place(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the file's beginning."""


class _Header(msgspec.Struct):
    places: list[_Place]
    weights: Any
    """The tree of dataclasses, with `{"tensor": index of its place}` where a tensor was."""


class BrokenFile(Exception):
    """The file is not what it was when it was written."""


def file_name(
    model_path: str | Path, config: ModelConfig, dtype: torch.dtype, quantization: Quantization
) -> str:
    """Changes with whatever changes the packed bytes. OSError: a weight file is gone."""
    parts = [config.fingerprint, str(dtype), quantization]
    for path in weight_files(Path(model_path)):
        status = path.stat()
        parts.append(f"{path.name}/{status.st_size}/{status.st_mtime_ns}")
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in _SOURCES:
        digest.update(Path(source).read_bytes())
    return f"{config.fingerprint[:8]}-{digest.hexdigest()[:24]}.packed"


def shared_weights(path: Path, pack: Callable[[], DecoderWeights]) -> DecoderWeights:
    """What `pack` yields, mapped from `path`, which is written first unless it is there and whole.

    Where it cannot be written, what `pack` yielded, in memory of our own; the log says why.
    """
    try:
        found = read(path)
        with suppress(OSError):
            os.utime(path)  # it was used
        return found
    except FileNotFoundError:
        pass
    except (BrokenFile, OSError) as error:
        _LOG.warning("%s: %s; packed again", path, error)
    packed = pack()
    try:
        write(path, packed)
        return read(path)
    except (BrokenFile, OSError) as error:
        _LOG.warning("packed weights are not kept for others: %s: %s", path.parent, error)
        return packed


def write(path: Path, packed: DecoderWeights) -> None:
    """OSError: no room, or it cannot be written; nothing is left then."""
    tensors: list[Tensor] = []
    tree = _taken_apart(packed, tensors, {})
    places, end = [], 0
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        places.append(_Place(name, tuple(tensor.shape), end))
        end = _aligned(end + tensor.nbytes)
    header, first = _header(places, tree)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < 2 * (first + end):
        raise OSError(f"too little room for {format_bytes(first + end)}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb", buffering=0) as file:
            digest, at = xxh3_128(), len(_MAGIC) + _DIGEST
            file.seek(at)

            def put(data: bytes | memoryview) -> None:
                nonlocal at
                digest.update(data)
                at += len(data)
                while data:
                    data = data[file.write(data) or 0 :]

            put(len(header).to_bytes(8, "little") + header)
            for place, tensor in zip(places, tensors, strict=True):
                put(bytes(place.offset - at))
                put(tensor.flatten().view(torch.uint8).numpy().data)
            file.seek(0)
            file.write(_MAGIC + digest.digest())
        os.replace(unfinished, path)
    _remove_old(path.parent)


def read(path: Path) -> DecoderWeights:
    """BrokenFile: it is not what was written. OSError: it is not there, or cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _PREFIX:
            raise BrokenFile(f"it ends after {size} bytes")
        # Copy on write: what nobody writes to is the page cache's, one copy for all who map it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = len(_MAGIC)
    with memoryview(mapped) as view:
        if view[:begin] != _MAGIC:
            raise BrokenFile("it is no file of packed weights")
        if xxh3_128_digest(view[begin + _DIGEST :]) != view[begin : begin + _DIGEST]:
            raise BrokenFile("its bytes do not match its digest")
        length = int.from_bytes(view[_PREFIX - 8 : _PREFIX], "little")
        header = msgspec.json.decode(view[_PREFIX : _PREFIX + length], type=_Header)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = []
    for place in header.places:
        dtype: torch.dtype = getattr(torch, place.dtype)
        count = dtype.itemsize * math.prod(place.shape)
        part = whole[place.offset : place.offset + count]
        tensors.append(part.view(dtype).view(place.shape))
    found = _put_together(header.weights, tensors)
    assert isinstance(found, DecoderWeights)
    return found


def _header(places: list[_Place], tree: Any) -> tuple[bytes, int]:
    """The header, and where the first tensor begins, which every place in it counts from."""
    length = len(msgspec.json.encode(_Header(places, tree))) + 24 * len(places)
    first = _aligned(_PREFIX + length)
    for place in places:
        place.offset += first
    header = msgspec.json.encode(_Header(places, tree))
    assert _PREFIX + len(header) <= first
    return header, first


def _taken_apart(value: Any, tensors: list[Tensor], known: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = len(tensors)
            tensors.append(value)
        return {"tensor": known[id(value)]}
    if is_dataclass(value):
        return {
            "type": type(value).__name__,
            "fields": {
                each.name: _taken_apart(getattr(value, each.name), tensors, known)
                for each in fields(value)
            },
        }
    if isinstance(value, tuple):
        return [_taken_apart(each, tensors, known) for each in value]
    return value


def _put_together(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, list):
        return tuple(_put_together(each, tensors) for each in tree)
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    parts = {name: _put_together(each, tensors) for name, each in tree["fields"].items()}
    return _TYPES[tree["type"]](**parts)


def _remove_old(folder: Path) -> None:
    with suppress(OSError):  # another worker may be doing the same
        files = sorted(folder.glob("*.packed"), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-FILES_MAX]:
            path.unlink(missing_ok=True)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
