"""Safetensors of a model folder, by name; quantized ones as levels, or made plain.

Files are mapped into memory; no pickle is ever read.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.engine.model_config import ModelError, weight_files
from slipstream.engine.quantized_config import Number, Quantized
from slipstream.engine.quantized_tensors import MARKS, PARTS, levels_of
from slipstream.kernels.levels import Levels

Cut: TypeAlias = tuple[slice, ...]
"""Of each dimension, from the first on; none: all."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDE = ("F64", "F32", "F16", "BF16")
_LEVELS = ("I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
"""Dtypes as safetensors name them, which no plain model has."""
_UNUSED = (
    ".rotary_emb.inv_freq",
    ".output_scale",
    *(f".{name}_{part}" for name in "kvq" for part in ("scale", "zero_point")),
)
"""Ends of names that nothing here asks for: what Transformers does not read either, and scales of a
float8 KV cache, which is scaled otherwise here."""


class Checkpoint:
    """Tensors by name over one or several files."""

    def __init__(
        self,
        folder: Path,
        files: dict[Path, Any],
        dtype: torch.dtype,
        quantized: Quantized | None = None,
        rows: Number | None = None,
    ) -> None:
        """`dtype`: of what is made plain. `rows`: see `levels_of`."""
        self.folder = folder
        self._file_of = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._files, self._unread = files, set(self._file_of)
        self._quantized, self._dtype, self._rows = quantized, dtype, rows

    def unread(self, tied_embeddings: bool) -> list[str]:
        """Names that nothing asked for, but for those that are not needed."""
        ignored = {"lm_head.weight"} if tied_embeddings else set()
        names = self._unread - ignored
        return sorted(name for name in names if not name.endswith(_UNUSED) and not self._idle(name))

    def _idle(self, name: str) -> bool:
        """A bias of zeros, which some quantizers give to modules that have none?"""
        module, _, part = name.rpartition(".")
        return part == "bias" and self._is_quantized(module) and not self._whole(name).any()

    def skip(self, name: str) -> None:
        self._unread.discard(name)
        self._unread.difference_update(self._parts(name.removesuffix(".weight")).values())

    def read(self, name: str, shape: tuple[int, ...], cut: Cut = ()) -> Tensor:
        """`cut` of the tensor, which has this shape. ModelError: it is not there, or not so."""
        if (levels := self.levels(name, shape)) is not None:
            plain = levels.plain()
            return plain[cut] if cut else plain
        path = self._file_of.get(name)
        if path is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        self._unread.discard(name)
        try:
            stored = self._files[path].get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ModelError(
                    f"{path}: {name} has shape {stored.get_shape()}, config.json says {list(shape)}"
                )
            tensor: Tensor = stored[cut] if cut else self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{path}: {name}: {error}") from error
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{path}: {name} is {tensor.dtype}, which is not supported")
        return tensor

    def levels(self, name: str, shape: tuple[int, ...]) -> Levels | None:
        """Of a quantized `weight` of this shape; None: it is none. ModelError: it is not so."""
        module, _, part = name.rpartition(".")
        if part != "weight" or not self._is_quantized(module):
            return None
        levels = self._levels(module)
        if shape != (levels.outputs, levels.inputs):
            have = [levels.outputs, levels.inputs]
            raise ModelError(
                f"{self.folder}: {name} has shape {have}, config.json says {list(shape)}"
            )
        self.skip(name)
        return levels

    def refuse_levels(self) -> None:
        """ModelError: a tensor is quantized, and config.json does not say how: its numbers would
        be taken for weights."""
        for name, path in self._file_of.items():
            module, _, part = name.rpartition(".")
            kind = self._files[path].get_slice(name).get_dtype()
            odd = part in MARKS or kind in _LEVELS or (part == "weight" and kind not in _WIDE)
            if odd and not name.endswith(_UNUSED) and not self._is_quantized(module):
                raise ModelError(
                    f"{path}: {name} is quantized ({kind}), and config.json does not say how "
                    "(quantization_config); take a copy that says so, or one in bfloat16"
                )

    def plain(self) -> dict[str, Tensor]:
        """All tensors, none of them quantized; floats in `dtype`."""
        made: dict[str, Tensor] = {}
        for name in self._file_of:
            module, _, part = name.rpartition(".")
            if not self._is_quantized(module) or part == "bias":
                tensor = self._whole(name)
                made[name] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            elif f"{module}.weight" not in made:
                made[f"{module}.weight"] = self._levels(module).plain()
        return {name: tensor for name, tensor in made.items() if not name.endswith(_UNUSED)}

    def _is_quantized(self, module: str) -> bool:
        marks = (f"{module}.{mark}" for mark in MARKS)
        return self._quantized is not None and any(mark in self._file_of for mark in marks)

    def _parts(self, module: str) -> dict[str, str]:
        """Names of its tensors but for the bias, by their last parts."""
        names = {part: f"{module}.{part}" for part in ("weight", *PARTS)}
        return {part: name for part, name in names.items() if name in self._file_of}

    def _levels(self, module: str) -> Levels:
        assert self._quantized is not None
        tensors = {part: self._whole(name) for part, name in self._parts(module).items()}
        method = self._quantized.method
        try:
            scheme = self._quantized.scheme(module)
            return levels_of(tensors, method, scheme, self._dtype, self._rows)
        except ValueError as error:
            raise ModelError(f"{self.folder}: {module} ({method}): {error}") from error

    def _whole(self, name: str) -> Tensor:
        path = self._file_of[name]
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{path}: {name}: {error}") from error
        return tensor


def _opened(path: Path, device: torch.device) -> Any:
    """Tensors come straight to the device."""
    return safe_open(str(path), framework="pt", device=str(device))


@contextmanager
def open_checkpoint(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantized: Quantized | None = None,
    rows: Number | None = None,
) -> Iterator[Checkpoint]:
    """ModelError: there are no such files, they are damaged, or quantized and nobody says how."""
    files: Iterable[Path] = weight_files(folder)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for path in files:
            try:
                opened[path] = stack.enter_context(_opened(path, device))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: {error}") from error
        checkpoint = Checkpoint(folder, opened, dtype, quantized, rows)
        checkpoint.refuse_levels()
        yield checkpoint
