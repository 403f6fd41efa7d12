"""One child of a fake cluster: `fake_child.py <journal folder> <role> <node id> [<http port>]`.

Writes each start and each SIGTERM into the journal, fails on order, and, as a frontend, answers
/readyz once every other child has started. Says that it lives, if it was told to.
"""

import contextlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

FAILS_TO_START = 4


def main(journal: Path, role: str, node_id: str, port: int) -> int:
    def write(word: str) -> None:
        with (journal / "journal").open("a") as file:
            file.write(f"{word} {node_id} {os.getpid()}\n")

    if (journal / f"fail-{node_id}").exists():  # it has never started: else all might be ready
        print(f"slipstream {role}: model.safetensors is damaged", flush=True)
        return FAILS_TO_START
    write("start")
    print(f"{node_id} says hello", flush=True)
    if (journal / f"crash-{node_id}").exists():
        return 1
    stop = threading.Event()

    def on_term(number: int, frame: object) -> None:
        write("term")
        if not (journal / f"deaf-{node_id}").exists():
            stop.set()

    signal.signal(signal.SIGTERM, on_term)
    if port:
        threading.Thread(target=serve, args=(port, journal), daemon=True).start()
    supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    supervisor.setblocking(False)
    while not stop.wait(0.05):
        if (journal / f"beat-{node_id}").exists():
            with contextlib.suppress(BlockingIOError):
                supervisor.sendto(b"WATCHDOG=1", os.environ["SLIPSTREAM_NOTIFY_SOCKET"])
    return 0


def serve(port: int, journal: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nodes = started(journal)
            ready = "decode-0" in nodes
            worker = {
                "num_blocks": 10,
                "block_bytes": 1024,
                "transports": {"shm": "x"},
                "quantization": "int8",
            }
            body = {
                "status": "ready" if ready else "starting",
                "reason": "" if ready else "no decode worker",
                "model": "toy",
                "max_model_len": 128,
                "nodes": [
                    {"node_id": name, "role": "x", "worker": worker if "de" in name else None}
                    for name in nodes
                ],
            }
            raw = json.dumps(body).encode()
            self.send_response(200 if ready else 503)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def started(journal: Path) -> list[str]:
    lines = (journal / "journal").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("start")]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
