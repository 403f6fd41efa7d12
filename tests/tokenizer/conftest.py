from pathlib import Path

import pytest

from slipstream.tokenizer.codec import TokenizerCodec
from tokenizer.models import byte_level, demo_folder, sentencepiece


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def folders(byte_level_folder: Path, sentencepiece_folder: Path) -> dict[str, Path]:
    found = {"byte_level": byte_level_folder, "sentencepiece": sentencepiece_folder}
    demo = demo_folder()
    return found if demo is None else {**found, "demo": demo}


@pytest.fixture(scope="session")
def codecs(folders: dict[str, Path]) -> dict[str, TokenizerCodec]:
    return {name: TokenizerCodec(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def byte_level_codec(codecs: dict[str, TokenizerCodec]) -> TokenizerCodec:
    return codecs["byte_level"]
