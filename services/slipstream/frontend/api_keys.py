"""The file of API keys: who may ask, and how much. It has digests; a key itself is nowhere.

    [[key]]
    name = "alice"
    sha256 = "5e88…"

Entries of one name are one client under several keys, which is how a key is changed: add one, move
to it, remove the other. A key is 256 random bits, so that its digest needs no salt.
"""

import hashlib
import hmac
import os
import secrets
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.config import SetupError

PRIORITY_MIN = -(2**31)
KEYS_MAX = 1000
FILE_BYTES_MAX = 1 << 20
PREFIX = "sk-slipstream-"
"""So that scanners of leaked secrets, and people, see what it is."""

Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Limit = Annotated[int, Meta(ge=0, le=10**12)]
"""0: none."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Word
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0
    requests_per_month: Limit = 0
    tokens_per_month: Limit = 0
    """Of the calendar's month, in UTC."""
    max_concurrent: Limit = 0
    weight: Annotated[int, Meta(ge=1, le=100)] = 1
    """Its part of the scheduler's queue, to those of others."""
    priority_min: Annotated[int, Meta(ge=PRIORITY_MIN, le=0)] = 0
    """The lowest `priority`, which goes first, that it may ask for."""
    share_prefixes: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """A group; its members share KV blocks of equal prompts."""
    operator: bool = False
    """May read /metrics and /cluster, and usage and traces of others."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    key: Annotated[list[ApiKey], Meta(max_length=KEYS_MAX)] = []


def parse(text: str) -> list[ApiKey]:
    """ValueError: what is wrong with it."""
    keys = msgspec.convert(tomllib.loads(text), _File).key
    named: dict[str, ApiKey] = {}
    for key in keys:
        first = named.setdefault(key.name, key)
        if msgspec.structs.replace(key, sha256=first.sha256) != first:
            raise ValueError(f"the entries named {key.name} differ in more than their sha256")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ValueError("two entries have the same sha256")
    return keys


def read(path: str) -> list[ApiKey]:
    """SetupError: the file is not there, anybody may write to it, or it says something else."""
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise SetupError(f"slipstream: --api-keys-file {path}: anybody may write to it")
            text = file.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise ValueError(f"it is longer than {FILE_BYTES_MAX} bytes")
        return parse(text.decode())
    except OSError as error:
        reason = f"{error.strerror}; make one: slipstream keys api NAME --api-keys-file {path}"
        raise SetupError(f"slipstream: --api-keys-file {path}: {reason}") from None
    except ValueError as error:  # of TOML, of UTF-8, and of what the members may be
        raise SetupError(f"slipstream: --api-keys-file {path}: {error}") from None


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Keyring:
    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keys = keys
        self._digests = [bytes.fromhex(key.sha256) for key in keys]

    def find(self, key: bytes) -> ApiKey | None:
        """Takes as long for every key that is offered, known or not."""
        offered, found = digest(key), None
        for known, entry in zip(self._digests, self.keys, strict=True):
            if hmac.compare_digest(known, offered):
                found = entry
        return found


# --- Making one -----------------------------------------------------------------------------------


def add(path: Path, wanted: ApiKey) -> str:
    """A new key, whose entry is at the end of the file from now on: `wanted`, or what is there of
    that name. SetupError if the file cannot be used."""
    keys = read(str(path)) if path.exists() else []
    known = next((key for key in keys if key.name == wanted.name), wanted)
    made = PREFIX + secrets.token_urlsafe(32)
    entry = msgspec.structs.replace(known, sha256=digest(made.encode()).hex())
    if len(keys) >= KEYS_MAX:
        raise SetupError(f"slipstream: --api-keys-file {path}: it has {KEYS_MAX} keys already")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write("\n".join(["", "[[key]]", *_members(entry), ""]))
    except OSError as error:
        raise SetupError(f"slipstream: --api-keys-file {path}: {error.strerror}") from None
    return made


def _members(key: ApiKey) -> Iterator[str]:
    """As TOML: what is not as it is without being said."""
    for field in msgspec.structs.fields(ApiKey):
        value = getattr(key, field.name)
        if field.required or value != field.default:
            yield f"{field.name} = {msgspec.json.encode(value).decode()}"
