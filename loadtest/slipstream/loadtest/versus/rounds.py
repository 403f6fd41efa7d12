"""Round after round, one server after the other; each measurement is saved when it is there."""

from pathlib import Path

import aiohttp

from slipstream.loadtest.versus import results as kept
from slipstream.loadtest.versus import server as servers
from slipstream.loadtest.versus.client import Client, model_name, new_session
from slipstream.loadtest.versus.errors import AnswerError, PeerMissing
from slipstream.loadtest.versus.loads import Load, PrefixLoad, run, warm_up
from slipstream.loadtest.versus.peers import Peer, Site
from slipstream.loadtest.versus.report import page
from slipstream.loadtest.versus.results import START, Measurement, Results

AnyLoad = Load | PrefixLoad


class Rounds:
    """What has been measured so far is in `results`; it is not measured again."""

    def __init__(self, site: Site, loads: list[AnyLoad], results: Results, output: Path) -> None:
        """`output`: without suffix; beside it `.json` and `.md` are written."""
        self._site, self._loads, self._results, self._output = site, loads, results, output

    async def run(self, peers: list[Peer], rounds: int) -> None:
        for round_ in range(1, rounds + 1):
            for peer in peers:
                if peer.name not in self._results.missing:
                    await self._peer(round_, peer)

    def install(self, peers: list[Peer]) -> None:
        for peer in peers:
            try:
                version = peer.install(self._site.peers_dir, len(self._site.cores))
            except PeerMissing as reason:
                self._miss(peer, reason)
            else:
                self._results.versions[peer.name] = version
                print(f"{peer.name}: {version}", flush=True)

    async def _peer(self, round_: int, peer: Peer) -> None:
        has = self._results.has
        loads = [load for load in self._loads if not has(round_, peer.name, load.name)]
        if not loads and has(round_, peer.name, START):
            return
        try:
            launch = peer.launch(self._site)
            self._results.commands[peer.name] = kept.shown(launch, self._site.peers_dir)
            log = self._site.peers_dir / "logs" / f"{peer.name}-{round_}.log"
            async with servers.running(launch, log) as server, new_session() as session:
                if not has(round_, peer.name, START):
                    self._add(round_, peer, START, {"start_s": server.start_s})
                await self._measure(round_, peer, loads, server, session)
        except PeerMissing as reason:
            self._miss(peer, reason)

    async def _measure(
        self,
        round_: int,
        peer: Peer,
        loads: list[AnyLoad],
        server: servers.Server,
        session: aiohttp.ClientSession,
    ) -> None:
        """PeerMissing: the server has ended."""
        try:
            client = Client(session, server.url, await model_name(session, server.url))
        except AnswerError as error:
            raise PeerMissing(str(error)) from None
        seed = f"{self._results.seed} round {round_}"
        for load in loads:
            try:
                async with server.weighing():
                    await warm_up(load, client, seed)
                numbers = await run(load, client, seed)
                server.weigh()
            except AnswerError as error:
                self._add(round_, peer, load.name, {}, str(error))
                server.require_alive()
            else:
                self._add(round_, peer, load.name, {**numbers, "peak_bytes": server.peak_bytes})

    def _add(
        self, round_: int, peer: Peer, load: str, numbers: dict[str, float], failure: str = ""
    ) -> None:
        self._results.add(Measurement(round_, peer.name, load, numbers, failure))
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(f"round {round_}, {peer.name}, {load}: {failure or told}", flush=True)
        self._save()

    def _miss(self, peer: Peer, reason: PeerMissing) -> None:
        self._results.missing[peer.name] = str(reason)
        print(f"{peer.name}: missing: {reason}", flush=True)
        self._save()

    def _save(self) -> None:
        kept.save(self._results, self._output.with_suffix(".json"))
        self._output.with_suffix(".md").write_text(page(self._results), encoding="utf-8")
