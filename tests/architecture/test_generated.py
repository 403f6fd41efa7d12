"""Pages that are written by programs are what the programs write today."""

import msgspec
import pytest

from architecture.sources import REPOSITORY
from slipstream.cli.commands import CONFIGURED
from slipstream.config.help import groups, help_text, markdown
from slipstream.config.values import kind_of
from slipstream.frontend.compatibility import page


def test_configuration_page_is_current() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(CONFIGURED), "run `make docs`"


def test_compatibility_page_is_current() -> None:
    written = (REPOSITORY / "docs" / "api-compatibility.md").read_text(encoding="utf-8")
    assert written == page(), "run `make docs`"


@pytest.mark.parametrize("command", CONFIGURED)
def test_every_setting_is_explained_once(command: str) -> None:
    cls = CONFIGURED[command]
    shown = [field.name for _, members in groups(cls) for field in members]
    assert sorted(shown) == sorted(field.name for field in msgspec.structs.fields(cls))
    for field in msgspec.structs.fields(cls):
        assert kind_of(field.type).description.endswith((".", "…")), f"{command}: {field.name}"


@pytest.mark.parametrize("command", CONFIGURED)
def test_help_fits_80_columns(command: str) -> None:
    assert max(len(line) for line in help_text(CONFIGURED[command], command).splitlines()) <= 80
