"""Slipstream beside vLLM and llama.cpp on this machine: `python -m slipstream.loadtest.versus`.

Installs the servers that are absent, starts one after the other, and writes a page and its numbers.
All of it takes hours on two cores; --peers, --loads, --concurrency and --rounds choose a part,
--resume goes on where a run has ended.
"""

import argparse
import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvloop

from slipstream.loadtest.versus import results as kept
from slipstream.loadtest.versus.loads import PREFIX, Load, PrefixLoad
from slipstream.loadtest.versus.peers import PEERS, Site
from slipstream.loadtest.versus.results import Results
from slipstream.loadtest.versus.rounds import AnyLoad, Rounds
from slipstream.loadtest.versus.server import read_through

LENGTHS = {"short": (256, 64), "long": (1024, 128), "repeating": (256, 64)}
PERIODS = {"repeating": 64}
LOADS = [*LENGTHS, PREFIX]


def closed_loop(kind: str, clients: int, requests: int) -> Load:
    """`requests`: 0 for as many as make a median steady."""
    many = max(4, clients * 3 // 2) if kind == "long" else max(8, 3 * clients)
    return Load(*LENGTHS[kind], clients, requests or many, PERIODS.get(kind, 0))


def chosen_loads(arguments: argparse.Namespace) -> list[AnyLoad]:
    found: list[AnyLoad] = []
    for kind in arguments.loads:
        if kind == PREFIX:
            found.append(PrefixLoad())
        else:
            found += [closed_loop(kind, n, arguments.requests) for n in arguments.concurrency]
    return found


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="versus", description=__doc__)
    add = parser.add_argument
    some = "NAME,…"
    add("--rounds", type=_count, default=3)
    add("--peers", type=_some_of(list(PEERS)), default=list(PEERS), metavar=some)
    add("--loads", type=_some_of(LOADS), default=LOADS, metavar=some, help=f"of {','.join(LOADS)}")
    add("--concurrency", type=_counts, default=[1, 8, 32], metavar="N,…", help="requests at a time")
    add("--requests", type=_count, default=0, help="of each closed loop, instead of its own number")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--output", type=Path, default=Path("docs/benchmarks/versus"), help="without .md, .json")
    cache = Path.home() / ".cache" / "slipstream" / "peers"
    add("--peers-dir", type=Path, default=cache, help="folder for what is installed, and logs")
    add("--resume", action="store_true", help="keep what --output has; failures are tried anew")
    add("--install-only", action="store_true")
    return parser.parse_args(words)


def _count(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= 10_000:
        raise argparse.ArgumentTypeError(f"{word}: expected a number from 1 to 10000")
    return int(word)


def _counts(words: str) -> list[int]:
    return [_count(word) for word in words.split(",")]


def _some_of(names: list[str]) -> Callable[[str], list[str]]:
    def parse_names(words: str) -> list[str]:
        for word in words.split(","):
            if word not in names:
                raise argparse.ArgumentTypeError(f"{word}: expected some of {','.join(names)}")
        return [name for name in names if name in words.split(",")]

    return parse_names


def demo_model() -> Path:
    """The folder of the demo model, converted if need be."""
    command = [sys.executable, "-m", "slipstream.cli.main", "model", "prepare", "demo"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return Path(done.stdout.strip())


def quality(model: Path) -> dict[str, float]:
    """Of int8 weights; in a process of its own, so that this one stays small."""
    command = [sys.executable, "-m", "slipstream.loadtest.quality", "--json", "--model", str(model)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return msgspec.json.decode(done.stdout, type=dict[str, float])


def begun(arguments: argparse.Namespace, words: list[str]) -> Results:
    """New results, or those that are there. SystemExit: these are of other prompts."""
    command = shlex.join(["python", "-m", "slipstream.loadtest.versus", *words])
    new = Results(
        command=command,
        date=kept.today(),
        machine=kept.this_machine(),
        seed=arguments.seed,
        requests=arguments.requests,
    )
    path = arguments.output.with_suffix(".json")
    if not arguments.resume:
        return new
    try:
        old = kept.load(path)
    except FileNotFoundError:
        return new
    except (OSError, msgspec.DecodeError) as error:
        raise SystemExit(f"versus: --resume: {path}: {error}") from None
    for name in ("machine", "seed", "requests"):
        then, now = getattr(old, name), getattr(new, name)
        if then != now:
            raise SystemExit(
                f"versus: --resume: {path} has {name} {then}, this run {now}; without --resume "
                "it begins anew"
            )
    old.drop_failures()
    if command not in old.command:
        old.command += f"; {command}"
    return old


async def _until_done_or_told(rounds: Rounds, arguments: argparse.Namespace) -> None:
    """SIGTERM ends the server that runs, as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await rounds.run([PEERS[name] for name in arguments.peers], arguments.rounds)


def main() -> None:
    words = sys.argv[1:]
    arguments = parse(words)
    model = demo_model()
    loads = chosen_loads(arguments)
    closed = [load for load in loads if isinstance(load, Load)]
    site = Site(
        peers_dir=arguments.peers_dir.expanduser().resolve(),
        model=model,
        cores=sorted(os.sched_getaffinity(0)),
        slots=max((load.concurrency for load in closed), default=1),
        context_tokens=max([load.prompt_tokens + load.output_tokens for load in closed] + [1040]),
    )
    rounds = Rounds(site, loads, begun(arguments, words), arguments.output)
    rounds.install([PEERS[name] for name in arguments.peers])
    if arguments.install_only:
        return
    if "slipstream-int8" in arguments.peers:
        rounds.results.quality = rounds.results.quality or quality(model)
    read_through(model)
    try:
        uvloop.run(_until_done_or_told(rounds, arguments))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit("versus: ended; --resume goes on from here") from None


if __name__ == "__main__":
    main()
