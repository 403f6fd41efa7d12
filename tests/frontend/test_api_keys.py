"""The file of API keys, and the command that fills it."""

import re
import stat
from pathlib import Path

import pytest

from slipstream.cli.main import main
from slipstream.config import SetupError
from slipstream.frontend.api_keys import ApiKey, Keyring, add, digest, parse, read

HASH = digest(b"k").hex()


def entry(**members: object) -> str:
    said = {"name": '"a"', "sha256": f'"{HASH}"', **members}
    return "\n".join(["[[key]]", *(f"{name} = {value}" for name, value in said.items())])


def test_a_key_is_made_once_and_found_by_its_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    flags = ["--requests-per-minute", "60", "--operator", "--share-prefixes", "team"]
    assert main(["keys", "api", "alice", "--api-keys-file", str(path), *flags]) == 0
    made, said = capsys.readouterr()
    key = made.strip()
    assert key.startswith("sk-slipstream-") and len(key) > 50 and key not in said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and key not in path.read_text()
    found = Keyring(read(str(path))).find(key.encode())
    assert found == ApiKey(
        name="alice",
        sha256=digest(key.encode()).hex(),
        requests_per_minute=60,
        operator=True,
        share_prefixes="team",
    )
    assert Keyring(read(str(path))).find(b"") is None


def test_a_second_key_of_a_name_has_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("# ours\n" + entry(weight=3))  # no line feed at its end
    second = add(path, ApiKey(name="a", sha256=HASH, weight=7))
    other = add(path, ApiKey(name="b", sha256=HASH, weight=7))
    ring = Keyring(read(str(path)))
    found = [ring.find(key) for key in (b"k", second.encode(), other.encode())]
    assert [(one.name, one.weight) for one in found if one] == [("a", 3), ("a", 3), ("b", 7)]
    assert path.read_text().startswith("# ours\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (entry() + "\n" + entry(weight=2), "named a differ in more than their sha256"),
        (entry() + "\n" + entry(name='"b"'), "the same sha256"),
        (entry(sha256='"k"'), "sha256"),
        (entry(name='"a/b"'), "name"),
        (entry(weight=0), "weight"),
        (entry(priority_min=1), "priority_min"),
        (entry(key='"k"'), "unknown field `key`"),
        ("[[key]", "Expected ']]'"),
        ("\n".join(entry(name=f'"n{n}"') for n in range(1001)), "length <= 1000"),
    ],
)
def test_what_the_file_may_not_say(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(text)
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SetupError, match="--api-keys-file") as told:
        read(str(path))
    assert reason in str(told.value) and "\n" not in str(told.value)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(SetupError, match=r"No such file.*slipstream keys api NAME"):
        read(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(SetupError, match="utf-8"):
        read(str(path))
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SetupError, match="longer than"):
        read(str(path))
    path.write_text(entry())
    path.chmod(0o602)
    with pytest.raises(SetupError, match="anybody may write"):
        read(str(path))
    with pytest.raises(SetupError, match="Is a directory"):
        read(str(tmp_path))


def test_serve_starts_nothing_with_a_file_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontend", "--api-keys-file", str(tmp_path / "no"), "--port", "0"]) == 3
    assert "keys api NAME" in capsys.readouterr().err
