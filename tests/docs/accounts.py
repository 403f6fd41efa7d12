"""Commands that no test can run as they stand, and what of them is checked instead.

Closed: what matches no line of `ACCOUNTS` is run."""

import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence

from containers.test_files import compose
from docs.pages import REPOSITORY
from slipstream.cli.commands import COMMANDS, SERVICES, unknown_variables

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
SETTING = re.compile(r"[A-Z][A-Z0-9_]*=")
COMPOSE = REPOSITORY / "compose"
SUBCOMMANDS = {
    "build", "config", "cp", "down", "exec", "kill", "logs", "ps", "restart", "stop", "up"
}  # fmt: skip
FOREIGN = {"aider", "cn", "docker", "litellm", "node", "open-webui", "uvx"}
"""Programs that are not ours and not here; a URL in their command is still to be ours."""


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """What is set before the command, and its words."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    settings = {}
    while words and SETTING.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    return settings, words


def flags(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def said_by(*words: str, **settings: str) -> str:
    """The output of a command that has to succeed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fetches(command: str) -> None:
    """From a network, which tests have none of. An extra of ours has to be there."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    for named in re.findall(r"\.\[([a-z,]+)\]", command):
        assert set(named.split(",")) <= extras.keys(), command


def carries(command: str) -> None:
    """From a registry as well: what it names are dependencies of ours, and of the same versions."""
    script = REPOSITORY / split(command)[1][0]
    assert os.access(script, os.X_OK), command
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    named = re.findall(r"'([a-z]+>=[^']+)'", script.read_text(encoding="utf-8"))
    assert named and set(named) <= set(project["project"]["dependencies"]), named


def makes(command: str) -> None:
    settings, words = split(command)
    assert not unknown_variables(settings), command
    for word in words[1:]:
        if SETTING.match(word):
            name, _, value = word.partition("=")
            assert re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE), f"no {name} in the Makefile"
            for target in set(words[1:]) & MODULES.keys():
                _known_to(MODULES[target], value)
        else:
            assert re.search(rf"^{word}:", MAKEFILE, re.MULTILINE), f"no target {word}"


MODULES = {
    "load": "slipstream.loadtest.load",
    "chaos": "slipstream.loadtest.chaos",
    "bench-vs": "slipstream.loadtest.versus",
}


def is_a_module(command: str) -> None:
    """Of the load tests: its --help names the options."""
    _, words = split(command)
    place = words.index("-m")
    _known_to(words[place + 1], shlex.join(words[place + 2 :]))


@functools.cache
def _help_of(*words: str) -> str:
    return said_by(*words, "--help")


def _known_to(module: str, options: str) -> None:
    known = _help_of(sys.executable, "-m", module)
    for flag in flags(shlex.split(options)):
        assert re.search(rf"(^|[\s,\[]){re.escape(flag)}\b", known), f"{module} has no {flag}"


def is_locust(command: str) -> None:
    _, words = split(command)
    assert (REPOSITORY / words[words.index("-f") + 1]).is_file(), command


def starts(command: str) -> None:
    """A service or all of them: the settings are sound."""
    settings, words = split(command)
    assert not unknown_variables(settings), command
    arguments = [word for word in words[1:] if word != "&"]
    said_by(sys.executable, "-m", "slipstream.cli.main", "config", "show", *arguments, **settings)


def composes(command: str) -> None:
    settings, words = split(command)
    files, at = [], 2
    while words[at].startswith("-"):
        assert words[at] == "-f", f"{command}: {words[at]}"
        files.append(COMPOSE / words[at + 1])
        at += 2
    given = [word for file in files or [COMPOSE / "compose.yaml"] for word in ("-f", str(file))]
    subcommand, rest = words[at], words[at + 1 :]
    assert subcommand in SUBCOMMANDS, command
    known = _help_of(*compose(), subcommand)
    if subcommand == "exec" and "slipstream" in rest:
        begins = rest.index("slipstream")
        _ours(rest[begins + 1 :])
        rest = rest[:begins]
    for flag in flags(rest):
        assert re.search(rf"(^|[\s,]){re.escape(flag)}\b", known), f"{subcommand} has no {flag}"
    project = json.loads(
        said_by(*compose(), "--env-file", "/dev/null", *given, "config", "--format", "json")
    )
    example = (COMPOSE / ".env.example").read_text(encoding="utf-8")
    for name in settings:
        assert re.search(rf"^{name}=", example, re.MULTILINE), f"no {name} in .env.example"
    scaled = [word.partition("=")[0] for word in rest if re.fullmatch(r"[a-z]+=\d+", word)]
    plain = [word for word in rest if re.fullmatch(r"[a-z]+", word)]
    named = plain[:1] if subcommand == "exec" else plain
    assert {*scaled, *named} <= project["services"].keys(), command


def _ours(words: Sequence[str]) -> None:
    """What is typed behind `slipstream`: its --help names the options."""
    name = next(words[:count] for count in (2, 1) if " ".join(words[:count]) in COMMANDS)
    known = _help_of(sys.executable, "-m", "slipstream.cli.main", *name)
    for flag in flags(words):
        shown = rf"(^|[\s,])--(\[no-\])?{re.escape(flag.removeprefix('--'))}\b"
        assert re.search(shown, known), f"{words[0]} has no {flag}"


def is_kubernetes(command: str) -> None:
    _, words = split(command)
    for flag, path in itertools.pairwise(words):
        if flag in ("-k", "-f"):
            assert (REPOSITORY / path).exists(), f"no {path}"


def puts_keys(command: str) -> None:
    """Into the checkout, where no test leaves any and git takes none."""
    ignored = (REPOSITORY / ".gitignore").read_text(encoding="utf-8").split()
    for path in re.findall(r"compose/[\w./-]+", command):
        known = any(f"{path}/".startswith(line) for line in ignored)
        assert known or (REPOSITORY / path / ".gitignore").is_file(), command
    if "keys api" in command:
        _ours(split(command)[1][1:])


def is_foreign(command: str) -> None:
    for port in re.findall(r"(?:127\.0\.0\.1|localhost|host\.docker\.internal):(\d+)", command):
        assert port in ("8000", "3000", "4000"), command


STARTERS = "|".join(["serve", "top", *SERVICES])
ACCOUNTS: list[tuple[str, Callable[[str], None]]] = [
    (r"git clone |(sudo )?apt-get |(\S+/)?pip install |npm install |docker pull ", fetches),
    (r"loadtest/carry-wheels ", carries),
    (r"make ", makes),
    (r"docker compose ", composes),
    (r"kubectl ", is_kubernetes),
    (r"(\S+/)?slipstream keys make compose/|(mkdir -m 700|chmod 644) compose/", puts_keys),
    (r"(\S+/)?slipstream keys api \S+ --api-keys-file compose/", puts_keys),
    (r"(\S+/)?python -m slipstream\.loadtest\.", is_a_module),
    (r"(\S+/)?locust ", is_locust),
    (rf"(\S+/)?slipstream ({STARTERS})\b(?!.*--once)", starts),
    (rf"({'|'.join(sorted(FOREIGN))}) ", is_foreign),
]


def account_of(command: str) -> Callable[[str], None] | None:
    """None: it is run."""
    words = re.sub(r"^(cd compose && )?([A-Z][A-Z0-9_]*=(\"[^\"]*\"|'[^']*'|\S*) +)*", "", command)
    return next((check for pattern, check in ACCOUNTS if re.match(pattern, words)), None)


NEVER_RUN = re.compile(r"\b(apt-get|docker|git|kubectl|(?<!keys )make|npm|pip|rm|sudo)\b")
"""Whatever a command looks like: these change the machine that the test runs on, or what is
committed."""
