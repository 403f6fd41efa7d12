"""Quantized copies of a model folder, as quantizers write them, and what they stand for.

compressed-tensors is there to be asked. AutoAWQ and AutoGPTQ are not maintained and want compilers:
what they write is put down here number by number, after their `WQLinear_GEMM.from_linear` and
`QuantLinear.pack`, and read back by compressed-tensors (AWQ) or by the formula in the paper.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.tiny import Bench, prompt_of, save_model

Parts = dict[str, Tensor]
Copies = Callable[[str, str], tuple[Path, Path]]
"""Case and format -> the quantized folder, and the plain one."""
CLOSE = 1e-4
"""Of logits, relative and absolute."""
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Format(NamedTuple):
    """`make`: a weight -> its parts by the last part of their names, and what they stand for."""

    config: dict[str, Any]
    make: Callable[[Tensor], tuple[Parts, Tensor]]
    word: str
    """What a worker on a CPU says of it."""


def _pieces(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """`[..., numbers that have one scale]`"""
    outputs, inputs = weight.shape
    match args.strategy:
        case "tensor":
            return weight.reshape(1, -1)
        case "channel":
            return weight[:, None]
        case "group":
            return weight.view(outputs, -1, args.group_size)
    rows, columns = args.block_structure
    pieces = weight.view(outputs // rows, rows, inputs // columns, columns)
    return pieces.transpose(1, 2).flatten(2)


def compressed(
    form: str,
    word: str,
    scale_dtype: torch.dtype = torch.float32,
    rows: bool = False,
    **weights: Any,
) -> Format:
    """By compressed-tensors itself. `rows`: for products with rows of the same kind."""
    args = QuantizationArgs(**weights)
    inputs = None
    if rows:
        inputs = QuantizationArgs(num_bits=8, type=args.type, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    compressor: Any = BaseCompressor.get_value_from_registry(form)

    def make(weight: Tensor) -> tuple[Parts, Tensor]:
        low, high = _pieces(weight, args).aminmax(dim=-1)
        scale, zero = calculate_qparams(low, high, args)
        plain = {"weight": weight, "weight_scale": scale.to(scale_dtype)}
        if not args.symmetric:
            plain["weight_zero_point"] = zero
        parts = compressor.compress(plain, scheme)
        # The library computes in the scales' dtype, we in float32.
        wide = {**parts, "weight_scale": parts["weight_scale"].float()}
        return parts, compressor.decompress(wide, scheme)["weight"]

    return Format(json.loads(json.dumps(config.to_dict(), default=str)), make, word)


def _uniform(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Levels `[in, out]` from 0 on, zero points and scales `[groups, out]`."""
    pieces = weight.t().reshape(-1, group, weight.shape[0])
    low, high = pieces.amin(1).clamp(max=0), pieces.amax(1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        scale = 2 * torch.maximum(-low, high) / top
        zero = torch.full_like(scale, (top + 1) // 2)
    else:
        scale = (high - low) / top
        zero = (-low / scale).round()
    scale = scale.half().float()
    levels = (pieces / scale[:, None] + zero[:, None]).round().clamp(0, top)
    return levels.flatten(0, 1).int(), zero.int(), scale


def _packed(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the columns, number by number: the n-th bits of a word are of number `order[n]`."""
    rows, columns = numbers.shape
    each = 32 // bits
    words = torch.zeros(rows, columns // each, dtype=torch.int64)
    for column in range(columns // each):
        for place in range(each):
            taken = order[place] if order else place
            words[:, column] |= numbers[:, column * each + taken].long() << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def awq(group: int) -> Format:
    settings = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config = {"quant_method": "awq", **settings, "modules_to_not_convert": None}
    reader = AutoAWQConverter(**settings)
    args = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    unpacker: Any = BaseCompressor.get_value_from_registry("pack-quantized")

    def make(weight: Tensor) -> tuple[Parts, Tensor]:
        levels, zero, scale = _uniform(weight, 4, group, symmetric=False)
        parts = {
            "qweight": _packed(levels, 4, AWQ_ORDER),
            "qzeros": _packed(zero, 4, AWQ_ORDER),
            "scales": scale.half(),
        }
        read = reader.process({f"x.{name}": tensor for name, tensor in parts.items()})
        stored = {name.removeprefix("x."): tensor for name, tensor in read.items()}
        stored["weight_scale"] = stored["weight_scale"].float()
        return parts, unpacker.decompress(stored, scheme)["weight"]

    return Format(config, make, "w4a16")


def gptq(
    bits: int, group: int, symmetric: bool = True, ordered: bool = False, version: int = 1
) -> Format:
    """`ordered`: inputs have their groups in no order, as `desc_act` leaves them."""
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }

    def make(weight: Tensor) -> tuple[Parts, Tensor]:
        inputs = weight.shape[1]
        size = inputs if group < 0 else group
        order = torch.arange(inputs)
        if ordered:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        g_idx = torch.empty(inputs, dtype=torch.int32)
        g_idx[order] = (torch.arange(inputs) // size).int()
        sorted_levels, zero, scale = _uniform(weight[:, order], bits, size, symmetric)
        levels = torch.empty_like(sorted_levels)
        levels[order] = sorted_levels
        if version == 1:
            zero = zero.clamp(min=1)
        parts = {
            "qweight": _packed(levels.t(), bits).t().contiguous(),
            "qzeros": _packed(zero - int(version == 1), bits),
            "scales": scale.half(),
            "g_idx": g_idx,
        }
        plain = scale[g_idx.long()] * (levels - zero[g_idx.long()])
        return parts, plain.t().contiguous()

    return Format(config, make, f"w{bits}a16")


def float8(block: int | None) -> Format:
    """As DeepSeek and Qwen have it in blocks; else one scale for all."""
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if block:
        config["weight_block_size"] = [block, block]

    def make(weight: Tensor) -> tuple[Parts, Tensor]:
        outputs, inputs = weight.shape
        size = block or max(outputs, inputs)
        across = [-(-outputs // size), -(-inputs // size)]
        scale = torch.empty(across)
        levels = torch.empty(outputs, inputs)
        plain = torch.empty(outputs, inputs)
        for row in range(across[0]):
            for column in range(across[1]):
                part = (slice(row * size, (row + 1) * size), slice(column * size, None))
                part = (part[0], slice(column * size, (column + 1) * size))
                scale[row, column] = weight[part].abs().max() / 448
                levels[part] = (weight[part] / scale[row, column]).to(torch.float8_e4m3fn).float()
                plain[part] = levels[part] * scale[row, column]
        stored = {"weight": levels.to(torch.float8_e4m3fn)}
        if block:
            return {**stored, "weight_scale_inv": scale}, plain
        return {**stored, "weight_scale": scale[0, 0]}, plain

    return Format(config, make, "fp8-w8a16")


_BF16 = torch.bfloat16
FORMATS: dict[str, Format] = {
    "compressed-tensors pack-quantized: 4 bits, groups": compressed(
        "pack-quantized", "w4a16", _BF16, num_bits=4, strategy="group", group_size=32
    ),
    "compressed-tensors pack-quantized: 4 bits, groups, zero points": compressed(
        "pack-quantized", "w4a16", num_bits=4, strategy="group", group_size=64, symmetric=False
    ),
    "compressed-tensors pack-quantized: 4 bits, channels": compressed(
        "pack-quantized", "w4a16", num_bits=4, strategy="channel"
    ),
    "compressed-tensors pack-quantized: 8 bits, groups": compressed(
        "pack-quantized", "w8a16", num_bits=8, strategy="group", group_size=128
    ),
    "compressed-tensors pack-quantized: 8 bits, channels, zero points": compressed(
        "pack-quantized", "w8a16", num_bits=8, strategy="channel", symmetric=False
    ),
    "compressed-tensors int-quantized: int8 weights and rows": compressed(
        "int-quantized", "w8a8", rows=True, num_bits=8, strategy="channel"
    ),
    "compressed-tensors naive-quantized: int8 weights": compressed(
        "naive-quantized", "w8a16", num_bits=8, strategy="channel"
    ),
    "compressed-tensors float-quantized: float8, channels": compressed(
        "float-quantized", "fp8-w8a16", _BF16, True, num_bits=8, type="float", strategy="channel"
    ),
    "compressed-tensors float-quantized: float8, one scale": compressed(
        "float-quantized", "fp8-w8a16", rows=True, num_bits=8, type="float", strategy="tensor"
    ),
    "compressed-tensors float-quantized: float8, blocks": compressed(
        *("float-quantized", "fp8-w8a16"),
        **{"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]},
    ),
    "awq: 4 bits, gemm": awq(64),
    "gptq: 4 bits": gptq(4, 32),
    "gptq: 4 bits, zero points, desc_act": gptq(4, 64, symmetric=False, ordered=True),
    "gptq: 4 bits, channels, second version": gptq(4, -1, version=2),
    "gptq: 8 bits": gptq(8, 64),
    "fp8: float8, blocks": float8(48),
    "fp8: float8, one scale": float8(None),
}
ROWS = "compressed-tensors int-quantized: int8 weights and rows"
"""Its rows are quantized too, on a CPU."""


def is_linear(name: str, tensor: Tensor) -> bool:
    """What quantizers take: matrices, but for vocabularies and routers."""
    apart = ("embed", "lm_head", "mlp.gate.", "block_sparse_moe.gate.", "expert_gate.")
    return tensor.dim() == 2 and name.endswith(".weight") and not any(x in name for x in apart)


def quantized(source: Path, folder: Path, form: Format) -> Path:
    """Writes the quantized copy to `folder`, and to the folder that it yields a plain one of what
    the quantized numbers stand for."""
    plain = folder.with_name(f"{folder.name}-plain")
    for target in (folder, plain):
        shutil.copytree(source, target, dirs_exist_ok=True)
    stored: Parts = {}
    meant: Parts = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if is_linear(name, tensor):
            del stored[name]
            parts, meant[name] = form.make(tensor.float())
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": each.contiguous() for part, each in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    contiguous = {name: tensor.contiguous() for name, tensor in meant.items()}
    save_file(contiguous, plain / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), "quantization_config": form.config}
    file.write_text(json.dumps(config))
    return plain


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["quantization_config"].update(changes)
    file.write_text(json.dumps(settings))


def transformers(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def expected(folder: Path, tokens: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return transformers(folder)(torch.tensor([tokens])).logits[0].float()


def ours(folder: Path, tokens: tuple[int, ...]) -> Tensor:
    """In two chunks."""
    bench = Bench(folder)
    table = bench.blocks(len(tokens))
    first = bench.logits((tokens[:33], 0, table))
    return torch.cat((first, bench.logits((tokens[33:], 33, table))))


def with_rounded_rows(model: PreTrainedModel, rounded: Callable[[Tensor], Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))


def to_int8(x: Tensor) -> Tensor:
    wide = x.double()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return ((wide / scale).round() * scale).float()


def is_right(form: str, folder: Path, plain: Path) -> bool:
    """Do the copies come to the same? Rows that are rounded too, here and there to another level,
    are nearer to what int8 rows give than those are to plain ones."""
    tokens, model = prompt_of(70), transformers(plain)
    with torch.no_grad():
        exact = model(torch.tensor([tokens])).logits[0, [32, 69]]
        if form != ROWS:
            return torch.allclose(ours(folder, tokens), exact, rtol=CLOSE, atol=CLOSE)
        with_rounded_rows(model, to_int8)
        wanted = model(torch.tensor([tokens])).logits[0, [32, 69]]
    return bool((ours(folder, tokens) - wanted).norm() < 0.2 * (wanted - exact).norm())


def made_and_right(form: str) -> bool:
    """Of copies that are made for it."""
    with TemporaryDirectory() as name:
        source, folder = Path(name) / "source", Path(name) / "quantized"
        save_model(source, "llama", **SIZES)
        return is_right(form, folder, quantized(source, folder, FORMATS[form]))
