"""The table of help texts is closed: what the services count is in it, and nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

from architecture.sources import REPOSITORY, source_files
from slipstream.runtime.metric_table import HTTP, KINDS, VLLM

KIND_OF = {
    "services/slipstream/frontend": "frontend",
    "services/slipstream/tokenizer": "tokenizer",
    "services/slipstream/scheduler": "scheduler",
    "services/slipstream/kvindex": "kvindex",
    "shared/slipstream/engine": "decode",
    "shared/slipstream/core/load.py": "decode",
    "shared/slipstream/kv": "decode",
    "shared/slipstream/runtime": "shell",
}
COUNTERS = {"_counts": "", "counters": "requests_"}
"""Attributes that count by name, and what `statistics` puts before the names."""
BEFORE = {"services/slipstream/kvindex": "index_", "shared/slipstream/kv/tier.py": "tier_"}
TELLING = {"statistics", "_statistics", "_counters"}
GENERATED = ("", "requests_", "requests_placed_", "index_", "tier_")


def counted(path: Path, before: str) -> Iterator[str]:
    """Keys in a file that are written as they are."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Subscript(
                value=ast.Attribute(attr="_counts" | "counters" as of),
                slice=ast.Constant(value=key),
            ):
                yield f"{before or COUNTERS[of]}{key}_total"
            case ast.Call(func=ast.Attribute(attr="_count"), args=[ast.Constant(value=key), *_]):
                yield str(key)
            case ast.FunctionDef(name=name) if name in TELLING:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Dict):
                        keys = [key for key in inner.keys if isinstance(key, ast.Constant)]
                        yield from (str(key.value) for key in keys if key.value not in HOLDERS)


HOLDERS = {"host", "disk"}
"""Of other dictionaries in these functions."""


def test_what_is_counted_has_a_help_text() -> None:
    missing, found = set(), set()
    for path in source_files():
        name = path.relative_to(REPOSITORY).as_posix()
        kinds = [kind for folder, kind in KIND_OF.items() if name.startswith(folder)]
        before = next((word for part, word in BEFORE.items() if name.startswith(part)), "")
        for key in counted(path, before) if kinds else ():
            found.add(key)
            plain, patterns = KINDS[kinds[0]]
            if key not in plain and not any(one.pattern.fullmatch(key) for one in patterns):
                missing.add(f"{name}: {key}")
    assert not missing
    assert {"steps_total", "requests_migrated_total", "index_gaps_total", "peers_up"} <= found


def test_nothing_is_described_that_nobody_counts() -> None:
    """It would be 0 for ever."""
    words = {
        node.value
        for path in source_files()
        if path.name != "metric_table.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    fields = {"steps", "running", "waiting", "waiting_tokens", "blocks_free", "blocks_used"}
    words |= fields | {"blocks_cached", "blocks_leased"}  # of WorkerLoad
    for kind, (plain, _) in KINDS.items():
        for key in plain:
            stems = {key, key.removesuffix("_total")}
            stems |= {key.removesuffix(f"_{unit}") for unit in ("blocks", "bytes")}
            stems = {stem.removeprefix(before) for stem in stems for before in GENERATED}
            assert stems & words, f"{kind}: {key}"
    assert HTTP.keys() | VLLM.keys() <= words


def test_help_texts_are_sentences() -> None:
    texts = [text for plain, _ in KINDS.values() for text in plain.values()]
    texts += [one.help for _, patterns in KINDS.values() for one in patterns]
    for text in (*texts, *HTTP.values(), *VLLM.values()):
        assert text[0].isupper() or text[0] in "01", text
        assert text.endswith("."), text
