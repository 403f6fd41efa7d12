"""The pages, and the fenced blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
NOT_READ = {"adr", "benchmarks"}
"""Folders of pages that say what was decided and measured at a time, not what to type today."""
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    found = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [page for page in found if not NOT_READ & set(page.relative_to(REPOSITORY).parts)]


class Block(NamedTuple):
    where: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        where = f"{page.relative_to(REPOSITORY).as_posix()}:{line}"
        indent = len(match[1])
        body = "".join(row[indent:] for row in match[3].splitlines(keepends=True))
        shows = re.search(r"^\$ ", body, re.MULTILINE) is not None
        found.append(Block(where, match[2] or ("console" if shows else "text"), body))
    return found


def commands_of(block: Block) -> list[str]:
    """Each with its continued lines; of a console block what stands behind `$`."""
    lines = block.text.splitlines()
    if block.language == "console":
        lines = _typed(lines)
    commands: list[str] = []
    begun: list[str] = []
    for line in lines:
        begun.append(line)
        whole = "\n".join(begun)
        if line.endswith("\\") or _open_quote(whole):
            continue
        if whole.strip() and not whole.lstrip().startswith("#"):
            commands.append(whole.strip())
        begun = []
    assert not begun, f"{block.where}: a quote is not closed"
    return commands


def _typed(lines: list[str]) -> list[str]:
    """Without what the commands printed."""
    found, goes_on = [], False
    for line in lines:
        if goes_on or line.startswith("$ "):
            found.append(line if goes_on else line[2:])
            goes_on = line.endswith("\\")
    return found


def _open_quote(text: str) -> bool:
    quote = ""
    escaped = comment = False
    for before, char in zip(" " + text, text, strict=False):
        if comment:
            comment = char != "\n"
        elif escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and before.isspace():
            comment = True
    return bool(quote)
