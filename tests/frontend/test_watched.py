"""A file that is read again when it changes; what cannot be read changes nothing."""

import asyncio
from pathlib import Path

import pytest

from slipstream.config import SetupError
from slipstream.frontend import watched
from slipstream.frontend.watched import Watched


def number(path: str) -> int:
    text = Path(path).read_text()
    if text == "bug":
        raise KeyError(text)
    try:
        return int(text)
    except ValueError:
        raise SetupError(f"{path}: {text} is no number") from None


async def test_it_says_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched, "RELOAD_S", 0.01)
    file = tmp_path / "n"
    file.write_text("1")
    found = Watched(str(file), number, 0)
    watching = asyncio.create_task(found.watch())
    assert found.now == 1

    async def after(text: str) -> int:
        file.write_text(text)
        await asyncio.sleep(0.1)
        return found.now

    assert await after("22") == 22
    assert await after("nonsense") == 22 and "nonsense is no number" in caplog.text
    assert await after("bug") == 22 and "holds on" in caplog.text
    file.unlink()
    await asyncio.sleep(0.05)
    assert found.now == 22 and await after("333") == 333
    watching.cancel()


def test_without_a_file_there_is_what_was_agreed() -> None:
    assert Watched("", number, 7).now == 7
    with pytest.raises(FileNotFoundError):
        Watched("/nowhere/n", number, 7)
