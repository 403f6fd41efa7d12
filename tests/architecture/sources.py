"""Where the source lies; shared by the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = tuple(
    name for name in ("shared", "kernels", "services", "loadtest") if (REPOSITORY / name).is_dir()
)


def source_files() -> Iterator[Path]:
    for root in ROOTS:
        yield from sorted((REPOSITORY / root).rglob("*.py"))


def module_name(path: Path) -> str:
    """`services/slipstream/cli/main.py` -> `slipstream.cli.main`"""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
