"""Our client beside `vllm bench serve`, both against Slipstream, in turn:

    python -m slipstream.loadtest.versus.agree [--rounds 3] [--concurrency 1,8]

Wants vLLM's environment, which `make bench-vs` installs. Prints one line for each client, load and
round, and how ours compares in the median.
"""

import argparse
import asyncio
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from slipstream.loadtest.versus import install
from slipstream.loadtest.versus import server as servers
from slipstream.loadtest.versus.__main__ import closed_loop, demo_model
from slipstream.loadtest.versus.client import Client, model_name, new_session
from slipstream.loadtest.versus.loads import Load, run, warm_up
from slipstream.loadtest.versus.peers import PEERS, Site

NUMBERS = {
    "output_tok_s": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
}
"""Ours -> vLLM's name of the same."""


def bench_serve(python: Path, url: str, name: str, model: Path, load: Load, seed: int) -> list[str]:
    """The command, less where it writes its result."""
    return [
        *("env", "-u", "PYTHONPATH", "HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"),
        *(str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", "openai", "--base-url", url, "--model", name, "--tokenizer", str(model)),
        *("--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)),
        *("--random-output-len", str(load.output_tokens), "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--seed", str(seed), "--disable-tqdm", "--save-result"),
        *("--ready-check-timeout-sec", "0"),  # its check would leave the first prompt's KV behind
    ]


def theirs(command: list[str]) -> dict[str, float]:
    """SystemExit: it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = ["--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run([*command, *out], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"vllm bench serve: {done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = msgspec.json.decode((Path(folder) / "result.json").read_bytes())
    return {ours: float(found[name]) for ours, name in NUMBERS.items()}


async def compare(site: Site, loads: list[Load], rounds: int) -> None:
    python = install.python(site.peers_dir)
    launch = PEERS["slipstream"].launch(site)
    ratios: dict[tuple[str, str], list[float]] = {}
    log = site.peers_dir / "logs" / "agree.log"
    async with servers.running(launch, log) as server, new_session() as session:
        name = await model_name(session, server.url)
        client = Client(session, server.url, name)
        for round_ in range(rounds):
            for load in loads:
                seed = f"agree {round_}"
                await warm_up(load, client, seed)
                ours = await run(load, client, seed)
                # Prompts of one seed begin alike: the server would have seen them.
                number = 1000 * round_ + load.concurrency
                command = bench_serve(python, server.url, name, site.model, load, number)
                other = await asyncio.to_thread(theirs, command)
                for what in NUMBERS:
                    ratio = ours[what] / other[what]
                    ratios.setdefault((load.name, what), []).append(ratio)
                for who, found in (("ours", ours), ("vllm", other)):
                    told = ", ".join(f"{what} {found[what]:.4g}" for what in NUMBERS)
                    print(f"round {round_ + 1}, {load.name}, {who}: {told}", flush=True)
    for (load_name, what), values in ratios.items():
        print(f"{load_name}, {what}: ours {statistics.median(values):.3f} of vLLM's client")


def main() -> None:
    parser = argparse.ArgumentParser(prog="agree", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", default="1,8", metavar="N,…")
    cache = Path.home() / ".cache" / "slipstream" / "peers"
    parser.add_argument("--peers-dir", type=Path, default=cache)
    arguments = parser.parse_args()
    loads = [closed_loop("short", int(n), 0) for n in arguments.concurrency.split(",")]
    site = Site(
        peers_dir=arguments.peers_dir,
        model=demo_model(),
        cores=[],
        slots=max(load.concurrency for load in loads),
        context_tokens=1040,
    )
    uvloop.run(compare(site, loads, arguments.rounds))


if __name__ == "__main__":
    main()
