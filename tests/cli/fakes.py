"""A model folder and child processes that start at once, to test what is around them."""

import json
from pathlib import Path


def write_model(folder: Path) -> Path:
    """The least that passes for a model folder: one tensor of two bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    return folder
