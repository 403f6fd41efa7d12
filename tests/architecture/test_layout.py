"""One namespace over several roots, and nothing else at the top."""

import slipstream
from architecture.sources import REPOSITORY, ROOTS

TOP_LEVEL = {
    "pyproject.toml",
    "services",
    "shared",
    "kernels",
    "compose",
    "tests",
    "loadtest",
    "docs",
    "README.md",
    "LICENSE",
    "Makefile",
}
BUILD_OUTPUTS = {"build", "dist"}


def test_no_root_hides_the_others() -> None:
    """An `__init__.py` makes a root the whole package and the others invisible, but for the one
    that looks for them."""
    own = [root for root in ROOTS if (REPOSITORY / root / "slipstream" / "__init__.py").exists()]
    assert own == ["shared"]
    assert not [root for root in (*ROOTS, "tests") if (REPOSITORY / root / "__init__.py").exists()]
    there = {str(REPOSITORY / root / "slipstream") for root in ROOTS}
    assert there <= set(slipstream.__path__)


def test_top_level_holds_only_what_is_agreed() -> None:
    names = {path.name for path in REPOSITORY.iterdir() if not path.name.startswith(".")}
    assert names - BUILD_OUTPUTS <= TOP_LEVEL
