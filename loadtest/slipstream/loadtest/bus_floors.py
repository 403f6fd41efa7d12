"""What a streamed token cannot cost less than, here: `python -m slipstream.loadtest.bus_floors`.

Each operation alone, in a loop, in one process: the best of some rounds, in µs for one token.
Messages carry the tokens of `--streams` streams, as those of one step do.
"""

import argparse
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
import zmq
from tokenizers import Tokenizer, decoders, models

from slipstream.core.node import encode_header
from slipstream.frontend.openai import ChatChunk, ChatChunkChoice, ChatDelta
from slipstream.messages import (
    INBOXES,
    WIRE_VERSION,
    FrameHeader,
    Message,
    TextDelta,
    TextOut,
    TokensOut,
    TokenSpan,
)
from slipstream.types import Role, pack_tokens

ROUNDS, ROUND_S = 5, 0.1
REQUEST_ID = "chatcmpl-0123456789abcdef0123456789abcdef-0"


def cost_us(operation: Callable[[], object]) -> float:
    """Of one call."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        calls, began_s = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - began_s) < ROUND_S:
            for _ in range(20):
                operation()
            calls += 20
        best_s = min(best_s, elapsed_s / calls)
    return best_s * 1e6


def spans(streams: int) -> TokensOut:
    tokens = pack_tokens([1234])
    return TokensOut(
        spans=[
            TokenSpan(request_id=f"{REQUEST_ID}{i}", attempt=1, position=100, tokens=tokens)
            for i in range(streams)
        ]
    )


def deltas(streams: int) -> TextOut:
    tokens = pack_tokens([1234])
    return TextOut(
        deltas=[
            TextDelta(
                request_id=f"{REQUEST_ID}{i}", attempt=1, position=100, tokens=tokens, text=" word"
            )
            for i in range(streams)
        ]
    )


def encode_event() -> object:
    delta = ChatDelta(content=" word")
    chunk = ChatChunk(
        id=REQUEST_ID,
        object="chat.completion.chunk",
        created=1_763_700_000,
        model="smollm2-135m-instruct",
        system_fingerprint="slipstream",
        choices=[ChatChunkChoice(index=0, delta=delta)],
    )
    return msgspec.json.encode(chunk)


def socket_us(size: int, streams: int) -> tuple[float, float]:
    """One write to, one read from each of some TCP connections of this host."""
    data, best_s = b"x" * size, [float("inf")] * 2
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        writers, readers = [], []
        for _ in range(streams):
            writers.append(stack.enter_context(socket.create_connection(server.getsockname())))
            writers[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            readers.append(stack.enter_context(server.accept()[0]))
        for _ in range(100):
            began_s = time.perf_counter()
            for writer in writers:
                writer.send(data)
            written_s = time.perf_counter()
            for reader in readers:
                reader.recv(65_536)
            read_s = time.perf_counter()
            best_s = [min(best_s[0], written_s - began_s), min(best_s[1], read_s - written_s)]
    return best_s[0] / streams * 1e6, best_s[1] / streams * 1e6


def bus_us(payload: bytes) -> float:
    """One frame sent and received, over ipc, both in this thread: its CPU time and ZeroMQ's."""
    header = encode_header(
        FrameHeader(WIRE_VERSION, "tokenizer-0", 1, "ipc:///tmp/run/tokenizer-0.sock", 1, 1, 1, 1)
    )
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        inbox, outgoing = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        inbox.bind(f"ipc://{folder}/inbox")
        outgoing.connect(f"ipc://{folder}/inbox")
        with inbox, outgoing:

            def trip() -> None:
                outgoing.send_multipart((header, payload), zmq.NOBLOCK)
                inbox.recv_multipart()

            return cost_us(trip)


def detokenize() -> Callable[[], object]:
    """The library's own incremental decoding."""
    model = models.BPE({"Ġword": 0, "Ġ": 1}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    stream = decoders.DecodeStream(skip_special_tokens=True)
    return lambda: stream.step(tokenizer, 0)


def message_us(message: Message, role: Role) -> tuple[float, float, float]:
    """Encoding it, decoding it, and its way over the bus."""
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(INBOXES[role]).decode
    payload = encode(message)
    return cost_us(lambda: encode(message)), cost_us(lambda: decode(payload)), bus_us(payload)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bus_floors", description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=128)
    streams = parser.parse_args().streams
    for message, role in ((spans(streams), Role.TOKENIZER), (deltas(streams), Role.FRONTEND)):
        name = type(message).__name__
        for what, us in zip(("encode", "decode", "bus"), message_us(message, role), strict=True):
            print(f"{name + ', ' + what:28} {us / streams:6.2f}")
    print(f"{'DecodeStream of tokenizers':28} {cost_us(detokenize()):6.2f}")
    print(f"{'event as JSON':28} {cost_us(encode_event):6.2f}")
    write_us, read_us = socket_us(270, streams)
    print(f"{'write to a TCP connection':28} {write_us:6.2f}")
    print(f"{'read from one':28} {read_us:6.2f}")


if __name__ == "__main__":
    main()
