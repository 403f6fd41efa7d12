"""Who answers to which name, and which calls are copied."""

from collections import Counter
from pathlib import Path

import pytest

from docs.pages import REPOSITORY, blocks_of
from slipstream.config import SetupError
from slipstream.frontend.routes import Routes, Shadow, read

KEYS = [f"{number:032x}" for number in range(4000)]
BOTH = {"old", "new"}
CANARY = Routes(
    alias={"chat": {"old": 90, "new": 10}, "old": {"old": 1, "new": 1}, "off": {"x": 0}}
)


def test_an_alias_shares_by_weight_and_a_call_keeps_its_share() -> None:
    drawn = {key: CANARY.target("chat", key, BOTH, BOTH) for key in KEYS}
    assert 0.08 < Counter(drawn.values())["new"] / len(KEYS) < 0.12
    assert drawn == {key: CANARY.target("chat", key, BOTH, BOTH) for key in KEYS}
    half = Counter(CANARY.target("old", key, BOTH, BOTH) for key in KEYS)
    assert 0.45 < half["new"] / len(KEYS) < 0.55, "an alias may stand in front of a model"


def test_when_a_model_leaves_the_calls_of_others_stay_where_they_are() -> None:
    routes = Routes(alias={"a": {"x": 1, "y": 1, "z": 1}})
    known = {"x", "y", "z"}
    before = {key: routes.target("a", key, known, known) for key in KEYS}
    after = {key: routes.target("a", key, known - {"z"}, known) for key in KEYS}
    assert all(after[key] == model for key, model in before.items() if model != "z")
    moved = Counter(after[key] for key, model in before.items() if model == "z")
    assert set(moved) == {"x", "y"} and min(moved.values()) > 0.4 * sum(moved.values())


def test_who_is_not_ready_gets_nothing_unless_nobody_is() -> None:
    assert {CANARY.target("chat", key, {"old"}, BOTH) for key in KEYS} == {"old"}
    assert {CANARY.target("chat", key, (), {"new"}) for key in KEYS} == {"new"}
    assert CANARY.target("chat", "k", (), ()) == "" == CANARY.target("off", "k", {"x"}, {"x"})
    assert CANARY.target("new", "k", (), ()) == "new", "what is no alias is a name"


def test_a_share_of_calls_is_copied() -> None:
    routes = Routes(
        shadow={"old": Shadow("new", 0.25), "all": Shadow("new"), "none": Shadow("x", 0)}
    )
    copied = Counter(routes.copied("old", key) for key in KEYS)
    assert set(copied) == {"", "new"} and 0.22 < copied["new"] / len(KEYS) < 0.28
    assert {routes.copied("all", key) for key in KEYS} == {"new"}
    assert {routes.copied("none", key) for key in KEYS} == {""} == {routes.copied("y", "k")}


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text('[alias.chat]\n"org/a" = 1\nb = 2.5\n[shadow."org/a"]\nto = "b"\nshare = 0.1\n')
    found = read(file)
    assert found.alias == {"chat": {"org/a": 1.0, "b": 2.5}}
    assert found.shadow == {"org/a": Shadow("b", 0.1)}


def test_the_file_of_the_page_is_read(tmp_path: Path) -> None:
    """A shadow of a model of which a canary has the name."""
    page = REPOSITORY / "docs" / "several-models.md"
    (block,) = (one for one in blocks_of(page) if "[alias." in one.text)
    (tmp_path / "routes.toml").write_text(block.text)
    found = read(tmp_path / "routes.toml")
    assert found.alias.keys() == {"chat", "smollm2"} and found.shadow.keys() == {"smollm2"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[alias", "Expected"),
        ("[aliases]\n", "unknown field `aliases`"),
        ("[alias.a]\n", "alias 'a' has 0 models"),
        ("[alias.a]\nx = 0\n", "one of them with a weight above 0"),
        ("[alias.a]\nx = -1\n", ">= 0"),
        ("[alias.a]\n" + "".join(f"m{i} = 1\n" for i in range(17)), "17 models; it takes 1 to 16"),
        ("[alias.a]\nqwen2.5 = 1\n", 'a name with a dot is written in quotes: "qwen2.5"'),
        ("[alias.qwen2.5]\nx = 1\n", "a name with a dot is written in quotes"),
        ("[shadow.qwen2.5]\nto = 'b'\n", "a name with a dot is written in quotes"),
        ("[shadow.a]\nshare = 1\n", "missing required field `to`"),
        ("[shadow.a]\nto = 'b'\nshare = 2\n", "<= 1"),
        ("[shadow.a]\nto = 'a'\n", "shadow 'a' to 'a': a shadow goes from one model to another"),
        ("[alias.a]\nb = 1\n[shadow.a]\nto = 'c'\n", "shadow 'a' to 'c': a shadow goes from"),
        ("[alias.a]\nb = 1\n[shadow.c]\nto = 'a'\n", "name the models behind it"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "routes.toml"
    file.write_text(text)
    with pytest.raises(SetupError) as raised:
        read(file)
    assert str(file) in str(raised.value) and why in str(raised.value)
    assert ("in quotes" in why) == ("in quotes" in str(raised.value)), "the hint is for dots alone"
    assert "\n" not in str(raised.value)
    with pytest.raises(SetupError, match="No such file"):
        read(tmp_path / "none.toml")
