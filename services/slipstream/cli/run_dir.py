"""The private folder of one run, and the removal of everything that a run leaves behind.

A lock on the folder tells a living run from one whose supervisor was killed; the lock goes with the
process, whatever ends it, and is right in another pid namespace too.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from slipstream.config import SetupError, make_folder

_PREFIX = "slipstream-"
_LOCK = "lock"
_PATH_BYTES = 107
_LONGEST_NAME = "/tokenizer-63.sock"


@contextmanager
def private_run_dir(base: Path, shm_dir: str) -> Iterator[Path]:
    """A fresh folder in `base`, of mode 0700, that goes away at the end, with this run's
    segments."""
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    lock = (path / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        remove(path, shm_dir)
        lock.close()


def run_dir_base(wanted: str, environ: Mapping[str, str]) -> Path:
    """Where to make it. SetupError: `wanted` cannot be used."""
    if wanted:
        base = Path(wanted).expanduser().absolute()
        make_folder("slipstream serve", "--run-dir", base, 0o700)
        room = _PATH_BYTES - len(f"/{_PREFIX}12345678{_LONGEST_NAME}")
        if len(os.fsencode(base)) > room:
            raise SetupError(
                f"slipstream serve: --run-dir: at most {room} bytes, so that socket paths fit, "
                f"got {len(os.fsencode(base))}"
            )
        return base
    for candidate in (environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if 0 < len(os.fsencode(candidate)) <= 64 and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return Path("/tmp")


def running(base: Path) -> list[Path]:
    """Folders of runs of ours that live."""
    found = []
    for path in sorted(base.glob(f"{_PREFIX}*")):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with (path / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append(path)
        except OSError:
            continue
    return found


def is_alive(path: Path) -> bool:
    """Whether the run in this folder is still held by its supervisor."""
    return path in running(path.parent)


def joined(wanted: str, environ: Mapping[str, str]) -> Path:
    """The folder of the run that `wanted` names. SetupError: there is no such run."""
    base = run_dir_base("", environ) if wanted == "auto" else Path(wanted).absolute().parent
    runs = running(base)
    if wanted != "auto":
        runs = [path for path in runs if path == Path(wanted).absolute()]
    if len(runs) == 1:
        return runs[0]
    what = f"none runs in {base}" if not runs else f"several run: {', '.join(map(str, runs))}"
    raise SetupError(
        f"slipstream serve: --join {wanted}: {what}; give the run directory that READY names"
    )


def sweep(base: Path, shm_dir: str) -> None:
    """Removes folders and segments of runs of ours that no supervisor holds any more."""
    for path in base.glob(f"{_PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with (path / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path, shm_dir)
        except OSError:
            continue  # alive, or not one of ours, or gone meanwhile


def remove(path: Path, shm_dir: str) -> None:
    """The folder, its sockets, and the shared-memory segments that carry its name."""
    for segment in Path(shm_dir).glob(f"slipstream-{path.name}-*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
