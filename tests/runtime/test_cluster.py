"""Real processes over real sockets: messages, deaths, standstills, signals."""

import signal

import pytest

from runtime.cluster import Cluster, until

MANY = 20_000


def test_many_messages_arrive_in_order(any_cluster: Cluster) -> None:
    """The asker's machine fails at an answer that is not the next one."""
    any_cluster.echo(record="")
    asker = any_cluster.asker(questions=MANY)

    def answers() -> list[str]:
        assert asker.process.poll() is None, asker.errors
        messages = [fields["message"] for name, fields in asker.story() if name == "Received"]
        return [m["request_id"] for m in messages if m["type"] == "Failed"]

    until(lambda: len(answers()) >= MANY, "all answers")
    assert answers() == [str(number) for number in range(MANY)]
    assert asker.saw("PeerDown") == 0


def test_peers_learn_each_other_and_start_in_any_order(any_cluster: Cluster) -> None:
    askers = [any_cluster.asker(f"asker-{i}", questions=10) for i in range(2)]
    until(lambda: askers[0].saw("Started"), "a start without a scheduler")
    any_cluster.echo()
    for asker in askers:
        until(lambda asker=asker: asker.saw("Received") >= 12, "answers and two times Peers")


def test_a_killed_peer_is_down_and_its_successor_up(any_cluster: Cluster) -> None:
    echo = any_cluster.echo()
    asker = any_cluster.asker(questions=5, peer_timeout_s=1.0)
    until(lambda: asker.saw("PeerUp", peer="scheduler"), "a session")
    echo.signal(signal.SIGKILL)
    until(lambda: asker.saw("PeerDown", peer="scheduler"), "news of the death")
    any_cluster.echo()  # ipc: over the socket file that the dead one left
    until(lambda: asker.saw("PeerUp", peer="scheduler") == 2, "a second session")
    epochs = [fields["epoch"] for name, fields in asker.story() if name == "PeerUp"]
    assert epochs[0] < epochs[1]
    order = [name for name, _ in asker.story() if name in ("PeerUp", "PeerDown")]
    assert order.count("PeerDown") >= 1 and order[-1] == "PeerUp"


def test_a_peer_that_stands_still_is_down_and_comes_back(cluster: Cluster) -> None:
    echo = cluster.echo(peer_timeout_s=1.0)
    asker = cluster.asker(questions=1, peer_timeout_s=1.0)
    until(lambda: asker.saw("PeerUp") and echo.saw("PeerUp"), "a session")
    asker.signal(signal.SIGSTOP)
    until(lambda: echo.saw("PeerDown", peer="asker-0"), "news of the standstill")
    asker.signal(signal.SIGCONT)
    until(lambda: asker.saw("PeerUp") == 2 and echo.saw("PeerUp") == 2, "a second session")
    assert asker.process.poll() is None and echo.process.poll() is None


def test_a_signal_drains(cluster: Cluster) -> None:
    echo = cluster.echo()
    asker = cluster.asker(drain_s=0.1)
    until(lambda: asker.saw("PeerUp"), "a session")
    assert asker.end() == 0
    assert asker.saw("Drain") == 1
    assert asker.saw("Exit") == 1
    assert not list(cluster.folder.glob("asker*.sock"))
    assert echo.end() == 0
    assert "info 100 % done" in echo.errors, "a machine's note is a line of the log"


def test_a_second_signal_ends_at_once(cluster: Cluster) -> None:
    asker = cluster.asker(drain_s=-1.0, executor="hangs")
    until(lambda: asker.saw("EncodePrompt"), "a thread that hangs")
    asker.signal(signal.SIGTERM)
    until(lambda: asker.saw("Drain"), "drain")
    assert asker.end() == 128 + signal.SIGTERM
    assert "second signal" in asker.errors


def test_a_drain_without_an_end_times_out(cluster: Cluster) -> None:
    asker = cluster.asker(drain_s=-1.0)
    until(lambda: asker.saw("Started"), "a start")
    assert asker.end() == 1
    assert "not drained after 1 s" in asker.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(cluster: Cluster, number: signal.Signals) -> None:
    asker = cluster.asker(executor="slow")
    until(lambda: (cluster.folder / "asker-0.sock").exists(), "a bound inbox")
    until(lambda: "SigCgt" in status(asker.process.pid) and caught(asker, number), "a handler")
    asker.signal(number)
    assert asker.wait() == 0
    assert "closed" in asker.errors
    assert asker.saw("Started") == 0


def status(pid: int) -> str:
    with open(f"/proc/{pid}/status") as file:
        return file.read()


def caught(peer, number: signal.Signals) -> bool:
    line = next(line for line in status(peer.process.pid).splitlines() if "SigCgt" in line)
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_an_executor_that_cannot_start_says_why(cluster: Cluster) -> None:
    asker = cluster.asker(executor="refuses")
    assert asker.wait() == 4
    assert asker.errors.splitlines() == ["closed", "slipstream asker: no such luck"]


def test_events_of_other_threads_all_arrive(cluster: Cluster) -> None:
    asker = cluster.asker(executor="posts")
    until(lambda: asker.saw("Closed") == 200, "every event of four threads")
    for thread in range(4):
        mine = [f["request_id"] for n, f in asker.story() if n == "Closed"]
        numbers = [int(i.split("-")[1]) for i in mine if i.startswith(f"{thread}-")]
        assert numbers == list(range(50)), "out of order"
    assert asker.end() == 0


@pytest.mark.parametrize("kind", ["fails", "none"])
def test_a_bug_ends_the_process_with_a_traceback(cluster: Cluster, kind: str) -> None:
    asker = cluster.asker(executor=kind)
    assert asker.wait() == 70
    assert "Traceback" in asker.errors
    assert "secret words" not in asker.errors
    assert not list(cluster.folder.glob("asker*.sock"))
