"""One namespace over several roots, and nothing else at the top."""

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
    """An `__init__.py` there would make one root a whole package, and the other roots invisible."""
    for root in (*ROOTS, "tests"):
        assert not (REPOSITORY / root / "slipstream" / "__init__.py").exists()
        assert not (REPOSITORY / root / "__init__.py").exists()


def test_top_level_holds_only_what_is_agreed() -> None:
    names = {path.name for path in REPOSITORY.iterdir() if not path.name.startswith(".")}
    assert names - BUILD_OUTPUTS <= TOP_LEVEL
