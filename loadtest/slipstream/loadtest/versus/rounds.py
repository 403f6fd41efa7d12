"""Round after round, one server after the other; each measurement is saved when it is there."""

import asyncio
from pathlib import Path

import aiohttp

from slipstream.loadtest.versus import results as kept
from slipstream.loadtest.versus import server as servers
from slipstream.loadtest.versus.client import Client, drafts, model_name, new_session
from slipstream.loadtest.versus.errors import AnswerError, PeerMissing
from slipstream.loadtest.versus.loads import Load, PrefixLoad, run, warm_up
from slipstream.loadtest.versus.peers import Peer, Site
from slipstream.loadtest.versus.report import page
from slipstream.loadtest.versus.results import START, Measurement, Results

AnyLoad = Load | PrefixLoad
COUNTED_S = 2.0
"""What a frontend tells of its workers is so old at most."""


class Rounds:
    """What has been measured so far is in `results`; it is not measured again."""

    def __init__(self, site: Site, loads: list[AnyLoad], results: Results, output: Path) -> None:
        """`output`: without suffix; beside it `.json` and `.md` are written."""
        self._site, self._loads, self.results, self._output = site, loads, results, output

    async def run(self, peers: list[Peer], rounds: int) -> None:
        for round_ in range(1, rounds + 1):
            for peer in peers:
                if peer.name not in self.results.missing:
                    await self._peer(round_, peer)

    def install(self, peers: list[Peer]) -> None:
        for peer in peers:
            try:
                version = peer.install(self._site.peers_dir, len(self._site.cores))
            except PeerMissing as reason:
                self._miss(peer, reason)
            else:
                self.results.versions[peer.name] = version
                print(f"{peer.name}: {version}", flush=True)

    async def _peer(self, round_: int, peer: Peer) -> None:
        has = self.results.has
        loads = [load for load in self._loads if not has(round_, peer.name, load.name)]
        if not loads and has(round_, peer.name, START):
            return
        try:
            launch = peer.launch(self._site)
            self.results.commands[peer.name] = kept.shown(launch, self._site.peers_dir)
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
        seed = f"{self.results.seed} round {round_}"
        for load in loads:
            try:
                async with server.weighing():
                    await warm_up(load, client, seed)
                before = await drafts(session, server.url)
                numbers = await run(load, client, seed)
                server.weigh()
                numbers |= await _acceptance(session, server.url, before)
            except AnswerError as error:
                self._add(round_, peer, load.name, {}, str(error))
                server.require_alive()
            else:
                self._add(round_, peer, load.name, {**numbers, "peak_bytes": server.peak_bytes})

    def _add(
        self, round_: int, peer: Peer, load: str, numbers: dict[str, float], failure: str = ""
    ) -> None:
        self.results.add(Measurement(round_, peer.name, load, numbers, failure))
        told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(f"round {round_}, {peer.name}, {load}: {failure or told}", flush=True)
        self._save()

    def _miss(self, peer: Peer, reason: PeerMissing) -> None:
        self.results.missing[peer.name] = str(reason)
        print(f"{peer.name}: missing: {reason}", flush=True)
        self._save()

    def _save(self) -> None:
        kept.save(self.results, self._output.with_suffix(".json"))
        self._output.with_suffix(".md").write_text(page(self.results), encoding="utf-8")


async def _acceptance(
    session: aiohttp.ClientSession, url: str, before: tuple[float, float]
) -> dict[str, float]:
    """The share of drafted tokens that were right; nothing where none were drafted."""
    if before == (0.0, 0.0):
        return {}  # the warm-up has some where there are any
    await asyncio.sleep(COUNTED_S)
    drafted, right = (
        now - then for now, then in zip(await drafts(session, url), before, strict=True)
    )
    return {"draft_acceptance": right / drafted} if drafted else {}
