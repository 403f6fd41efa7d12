"""The servers that are compared: how each is installed, and started at its best settings."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from slipstream.cli.model_error import ModelError
from slipstream.cli.models import demo_file
from slipstream.loadtest.versus import install
from slipstream.loadtest.versus.errors import PeerMissing
from slipstream.loadtest.versus.server import Launch, Program, free_ports

BASELINE = "vllm"
_HOST = "http://127.0.0.1"


class Site(msgspec.Struct, frozen=True):
    """What is the same for all peers."""

    peers_dir: Path
    model: Path
    """The demo model as a folder, bfloat16."""
    cores: list[int]
    slots: int
    """The most requests at a time."""
    context_tokens: int
    """The longest prompt with its answer."""

    def gguf(self) -> Path:
        """The demo model as it is shipped, Q4_1. PeerMissing without it."""
        try:
            return demo_file()
        except ModelError as error:
            raise PeerMissing(str(error)) from None


class Peer(msgspec.Struct, frozen=True):
    name: str
    what: str
    """Weights and processes, for the page."""
    install: Callable[[Path, int], str]
    """(folder of all peers, number of cores) -> name and version. PeerMissing."""
    launch: Callable[[Site], Launch]


def _slipstream(*flags: str) -> Callable[[Site], Launch]:
    """Defaults, but for one: no peer refuses a request that would wait for long, so we do not."""

    def launch(site: Site) -> Launch:
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "slipstream.cli.main", "serve", str(site.model)]
        command += ["--port", str(port), "--dtype", "bfloat16", "--ttft-target-s", "0", *flags]
        return _alone(command, port, "/readyz")

    return launch


def _alone(command: list[str], port: int, ready: str) -> Launch:
    url = f"{_HOST}:{port}"
    return Launch([Program(command, url + ready)], url)


def _vllm_command(site: Site, port: int, cores: list[int], *settings: str) -> list[str]:
    """Without what it would look up on the network. Prefix caching is on, as it is by default."""
    return [
        *("env", "-u", "PYTHONPATH"),
        f"VLLM_CPU_OMP_THREADS_BIND={cores[0]}-{cores[-1]}",
        *("VLLM_CPU_KVCACHE_SPACE=2", "HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1"),
        *(f"VLLM_CACHE_ROOT={site.peers_dir / 'vllm-cache'}", *settings),
        *(str(install.python(site.peers_dir)), "-m", "vllm.entrypoints.cli.main", "serve"),
        *(str(site.model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        "--disable-uvicorn-access-log",
    ]


def _vllm(site: Site) -> Launch:
    (port,) = free_ports(1)
    return _alone(_vllm_command(site, port, site.cores), port, "/health")


def _vllm_apart(site: Site) -> Launch:
    """Two servers with half of the cores each, KV by NIXL in host memory, and our proxy."""
    if len(site.cores) < 2:
        raise PeerMissing("prefill and decode apart need two cores")
    half = len(site.cores) // 2
    ports = free_ports(5)
    transfer = json.dumps(
        {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    )
    programs = []
    parts = (site.cores[:half], site.cores[half:])
    for cores, port, side_port in zip(parts, ports[:2], ports[2:4], strict=True):
        side = f"VLLM_NIXL_SIDE_CHANNEL_PORT={side_port}"
        command = _vllm_command(site, port, cores, side)
        command += ["--kv-transfer-config", transfer]
        programs.append(Program(command, f"{_HOST}:{port}/health"))
    urls = [f"{_HOST}:{port}" for port in ports]
    proxy = [sys.executable, "-m", "slipstream.loadtest.versus.proxy", "--port", str(ports[4])]
    proxy += ["--prefill", urls[0], "--decode", urls[1]]
    return Launch([*programs, Program(proxy, f"{urls[4]}/health")], urls[4])


def _llama_cpp(site: Site) -> Launch:
    """A slot for each request at a time. No second cache in memory: prompts do not come back to
    another slot, so that copying them there costs and wins nothing."""
    (port,) = free_ports(1)
    threads = str(len(site.cores))
    slot_tokens = -(-site.context_tokens // 256) * 256
    command = [str(install.llama_server(site.peers_dir)), "-m", str(site.gguf())]
    command += ["--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads]
    command += ["-np", str(site.slots), "-c", str(site.slots * slot_tokens), "--no-webui"]
    return _alone([*command, "--cache-ram", "0"], port, "/health")


PEERS = {
    peer.name: peer
    for peer in (
        Peer("vllm", "bf16, one process for the model", install.vllm, _vllm),
        Peer("slipstream", "bf16, defaults", install.slipstream, _slipstream()),
        Peer(
            "slipstream-int8",
            "int8 weights, defaults",
            install.slipstream,
            _slipstream("--quantization", "int8"),
        ),
        Peer(
            "slipstream-ngram",
            "bf16, n-gram drafts of up to 4 tokens",
            install.slipstream,
            _slipstream("--speculative", "ngram:4"),
        ),
        Peer(
            "slipstream-apart",
            "bf16, every prompt computed by prefill and handed over",
            install.slipstream,
            _slipstream("--disaggregation", "always"),
        ),
        Peer("vllm-apart", "bf16, prefill and decode apart, NIXL", install.vllm, _vllm_apart),
        Peer("llama.cpp", "Q4_1, as shipped", install.llama_cpp, _llama_cpp),
    )
}
