"""Rounds with servers that are real processes and fake models."""

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loadtest import fake_openai
from slipstream.loadtest.versus import results as kept
from slipstream.loadtest.versus.__main__ import begun, chosen_loads, parse
from slipstream.loadtest.versus.errors import PeerMissing
from slipstream.loadtest.versus.loads import Load, PrefixLoad
from slipstream.loadtest.versus.peers import PEERS, Peer, Site
from slipstream.loadtest.versus.results import START
from slipstream.loadtest.versus.rounds import Rounds
from slipstream.loadtest.versus.server import Launch, Program, free_ports, running

LOADS = [Load(5, 8, 2, 4), PrefixLoad(20, 4, 4, 2, 1)]
WELL, DEAD, ABSENT = "vllm", "slipstream", "llama.cpp"
"""Peers' own names, for the page knows no others."""


def fake_server(site: Site) -> Launch:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, fake_openai.__file__, str(port)]
    return Launch([Program(command, f"{url}/health")], url)


def dying_server(site: Site) -> Launch:
    good = fake_server(site)
    words = "print('starting'); print('no memory left'); print(); raise SystemExit(3)"
    return Launch([*good.programs, Program([sys.executable, "-c", words], "http://x")], good.url)


def installed(peers_dir: Path, cores: int) -> str:
    return "fake 1.0"


def not_installed(peers_dir: Path, cores: int) -> str:
    raise PeerMissing("cmake is absent")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "peers", tmp_path / "model", [0, 1], 2, 64)


@pytest.fixture
def start(site: Site, tmp_path: Path) -> Callable[..., Rounds]:
    def start(*words: str) -> Rounds:
        output = tmp_path / "versus"
        return Rounds(site, LOADS, begun(parse([*words, "--output", str(output)]), []), output)

    return start


def children() -> set[psutil.Process]:
    """Other tests of this process may have left theirs."""
    return set(psutil.Process().children(recursive=True))


async def test_what_runs_what_dies_and_what_is_absent(
    start: Callable[..., Rounds], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [
        Peer(WELL, "", installed, fake_server),
        Peer(DEAD, "", installed, dying_server),
        Peer(ABSENT, "", not_installed, fake_server),
    ]
    rounds, before = start(), children()
    rounds.install(peers)
    await rounds.run(peers, 2)
    assert children() <= before

    found = kept.load(tmp_path / "versus.json")
    assert found.missing == {
        DEAD: "ended with code 3: no memory left",
        ABSENT: "cmake is absent",
    }
    assert found.versions == {WELL: "fake 1.0", DEAD: "fake 1.0"}
    assert {(one.round, one.peer, one.load) for one in found.measurements} == {
        (round_, WELL, load) for round_ in (1, 2) for load in (START, "5/8 x2", "prefix")
    }
    for round_ in (1, 2):
        assert found.value(round_, WELL, "5/8 x2", "peak_bytes") > 2**20
        assert found.value(round_, WELL, START, "start_s") > 0
    assert "missing: cmake is absent" in (tmp_path / "versus.md").read_text(encoding="utf-8")

    capsys.readouterr()
    more = start("--resume")
    await more.run(peers[:1], 3)
    assert kept.load(tmp_path / "versus.json").rounds == [1, 2, 3]
    told = capsys.readouterr().out
    assert "round 3" in told and "round 1" not in told and "round 2" not in told


async def test_a_server_that_refuses_is_a_failure(
    start: Callable[..., Rounds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "slipstream.loadtest.versus.loads.prompt", lambda seed, n, period: [fake_openai.REFUSED] * n
    )
    await start().run([Peer(WELL, "", installed, fake_server)], 1)
    found = kept.load(tmp_path / "versus.json")
    (_, loop, prefix) = found.measurements
    assert loop.failure.startswith("4 of 4 answers: HTTP 500")
    assert prefix.failure and not loop.numbers
    assert not begun(parse(["--resume", "--output", str(tmp_path / "versus")]), []).has(
        1, WELL, "prefix"
    )


async def test_a_server_and_its_children_are_weighed_and_ended(tmp_path: Path) -> None:
    """A child that ignores SIGTERM, of a program that does not end it."""
    (port,) = free_ports(1)
    child = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); x = bytes(2**26); time.sleep(99)"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"sys.argv[1:] = ['{port}']; import runpy;"
        f"runpy.run_path({fake_openai.__file__!r}, run_name='__main__')"
    )
    url = f"http://127.0.0.1:{port}"
    launch = Launch([Program([sys.executable, "-c", parent], f"{url}/health")], url)
    before = children()
    async with running(launch, tmp_path / "log") as server:
        async with server.weighing():
            pass
        processes = children() - before
        assert len(processes) == 2
        own = [process.memory_info().rss for process in processes]
        assert 0.5 * sum(own) < server.peak_bytes <= sum(own)
    assert not any(process.is_running() for process in processes)


def test_loads_as_asked_for() -> None:
    loads = chosen_loads(parse(["--loads", "prefix,short", "--concurrency", "1,32"]))
    assert [load.name for load in loads] == ["256/64 x1", "256/64 x32", "prefix"]
    assert [load.requests for load in loads if isinstance(load, Load)] == [8, 96]
    few = chosen_loads(parse(["--loads", "long", "--concurrency", "8", "--requests", "4"]))
    assert few == [Load(1024, 128, 8, 4)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--peers", "vllm,sglang"], "sglang: expected some of vllm,slipstream"),
        (["--rounds", "0"], "0: expected a number from 1 to 10000"),
        (["--concurrency", "1,x"], "x: expected a number"),
    ],
)
def test_bad_words_are_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert told in capsys.readouterr().err


def test_only_the_same_prompts_are_resumed(start: Callable[..., Rounds], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "versus")]
    kept.save(begun(parse(output), []), tmp_path / "versus.json")
    with pytest.raises(SystemExit, match="has seed 0, this run 1; without --resume"):
        begun(parse([*output, "--resume", "--seed", "1"]), [])


def test_every_server_says_how_it_is_started(site: Site) -> None:
    """All have the same threads: those of the machine."""
    lines = {
        name: kept.shown(peer.launch(site), site.peers_dir)
        for name, peer in PEERS.items()
        if name != "llama.cpp"  # needs its environment
    }
    assert "OMP_THREADS_BIND=0-1" in lines["vllm"][0]
    assert [line.count("THREADS_BIND=0-0") for line in lines["vllm-apart"]] == [1, 0, 0]
    assert [line.count("THREADS_BIND=1-1") for line in lines["vllm-apart"]] == [0, 1, 0]
    assert "--disaggregation always" in lines["slipstream-apart"][0]
