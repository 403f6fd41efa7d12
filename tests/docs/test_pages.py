"""What the pages say of fields, paths, errors and settings is what the code has; links lead on."""

import importlib.util
import json
import re
from pathlib import Path
from typing import cast

import msgspec
import pytest

from docs.accounts import MAKEFILE, split
from docs.pages import FENCE, REPOSITORY, pages
from frontend.fakes import FakeGateway
from slipstream.cli.commands import COMMANDS, known_variables
from slipstream.errors import ERRORS
from slipstream.frontend.app import AppSettings, build_app
from slipstream.frontend.gateway import Gateway
from slipstream.frontend.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generate,
    TokenizeRequest,
    Unserved,
    UnservedChat,
    UnservedCompletion,
)
from slipstream.frontend.validate import NEUTRAL

DOCS = REPOSITORY / "docs"
NAME = re.compile(r"`([a-z_]+)`")


def section(page: str, heading: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {heading}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Cells of every table, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head_and_rule = {
        n + d for n, row in enumerate(cells) if set("".join(row)) == {"-"} for d in (-1, 0)
    }
    return [row for n, row in enumerate(cells) if n not in head_and_rule]


def members(*structs: type[msgspec.Struct]) -> set[str]:
    return {name for struct in structs for name in struct.__struct_fields__}


SERVED = members(Generate) - members(Unserved)


@pytest.mark.parametrize(
    ("heading", "wanted"),
    [
        ("Fields of both", SERVED),
        ("Chat completions", members(ChatRequest) - members(Generate, UnservedChat)),
        ("Completions", members(CompletionRequest) - members(Generate, UnservedCompletion)),
        ("Refused", members(UnservedChat, UnservedCompletion)),
    ],
)
def test_fields(heading: str, wanted: set[str]) -> None:
    named = [name for row in rows(section("api.md", heading)) for name in NAME.findall(row[0])]
    assert len(named) == len(set(named)) and set(named) == wanted


def test_fields_of_tokenize() -> None:
    named = {name for name in NAME.findall(section("api.md", "Tokenize and detokenize"))}
    assert named == members(TokenizeRequest, DetokenizeRequest)


def test_values_that_change_nothing() -> None:
    said = {}
    for names, value in rows(section("api.md", "Refused")):
        for name in NAME.findall(names):
            given = re.fullmatch(r"`(.*)`", value)
            said[name] = (json.loads(given[1]),) if given else ()
    assert {name: values for name, values in said.items() if values} == NEUTRAL


def test_paths() -> None:
    app = build_app(cast(Gateway, FakeGateway()), AppSettings())
    served = {
        f"{route.method} {re.sub(r':[^}]*', '', route.resource.canonical)}"
        for route in app.router.routes()
        if route.resource and route.method != "HEAD"
    }
    cells = " ".join(row[0] for row in rows(section("api.md", "Paths")))
    assert set(re.findall(r"`((?:GET|POST|DELETE) [^`]*)`", cells)) == served


def test_errors() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    said = {row[0].strip("`"): (int(row[1]), row[2].strip("`")) for row in rows(text)}
    assert said == {code.value: (spec.status, spec.type) for code, spec in ERRORS.items()}
    final = [code for code, spec in ERRORS.items() if spec.status >= 500 and not spec.retryable]
    assert {code.value for code in final} == {
        *("too_many_migrations", "request_quarantined", "deadline_exceeded"),
    }


FLAG = re.compile(r"`(--[a-z][a-z0-9-]+)[ =`]")
OF_OTHERS = {"--build", "--wait", "--scale", "--extra-index-url", "--resume", "--rounds", "--loads"}
"""Of Compose, pip and the load tests."""


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def of_us(page: Path) -> bool:
    """Whether its flags are those of the command `slipstream`."""
    others = ("loadtesting.md", "reliability.md", "CONTRIBUTING.md")
    return page.parent.name != "clients" and page.name not in others


@pytest.mark.parametrize(
    "page", [page for page in pages() if of_us(page)], ids=lambda page: page.name
)
def test_settings_that_prose_names_are_there(page: Path) -> None:
    fields = members(*(command.settings for command in COMMANDS.values()))
    known = {f"--{name.replace('_', '-')}" for name in fields} | {"--help", "--config"}
    known |= {f"--no-{name[2:]}" for name in known} | OF_OTHERS
    assert not set(FLAG.findall(prose(page))) - known
    variables = set(re.findall(r"\bSLIPSTREAM_[A-Z0-9_]*[A-Z0-9]\b", prose(page)))
    of_compose = set(
        re.findall(r"^(\w+)=", (REPOSITORY / "compose/.env.example").read_text(), re.M)
    )
    assert not variables - known_variables() - of_compose


INLINE = re.compile(r"`((?:\S+=\S+ )*(?:\S*/)?(?:make|slipstream|python) [^`]+)`")


PLANNED = "roadmap.md"
"""Names what is not there yet."""


@pytest.mark.parametrize(
    "page", [page for page in pages() if page.name != PLANNED], ids=lambda page: page.name
)
def test_commands_in_prose(page: Path) -> None:
    """By name only: what is to be typed as it stands is in a block, and is run."""
    for span in INLINE.findall(prose(page)):
        _, words = split(span.replace("\n", " "))
        program, rest = words[0].rpartition("/")[2], words[1:]
        if program == "make":
            targets = [word for word in rest if re.fullmatch("[a-z-]+", word)]
            assert all(re.search(rf"^{one}:", MAKEFILE, re.MULTILINE) for one in targets), span
        elif program == "slipstream":
            known = {*COMMANDS, "COMMAND", "--help", *(name.split()[0] for name in COMMANDS)}
            assert {rest[0], " ".join(rest[:2])} & known, span
        elif rest[0] == "-m" and rest[1].startswith("slipstream."):
            assert importlib.util.find_spec(rest[1]), span


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"
