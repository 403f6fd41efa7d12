"""Grammars that are nested deeply: what the checker lets pass overflows no worker's stack."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.test_guide import EOS, Saved
from engine.tiny import WORDS, WORDS_VOCAB
from slipstream.grammar import STACK_BYTES, tokenizer
from slipstream.tokenizer.grammar_check import Question, Reply

SYSTEM_STACK_KB = 1024
"""Less than the checker's stack: what it lets pass overflows a thread that has this one."""

FOLLOW = """
import ctypes, sys, threading
from unittest.mock import Mock
from slipstream.core.machine import BatchPlan, RunBatch
from slipstream.engine.executor import WorkerExecutor
from slipstream.engine.guide import Guides
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.step_loop import Made

folder, tokens, grammar = sys.argv[1], [int(token) for token in sys.argv[2].split(",")], sys.argv[3]
runner, done = Mock(), threading.Event()
executor = WorkerExecutor(runner, Mock(), Mock(), dict)
guide = Guides(folder, ModelConfig.read(folder)).guide(grammar, 1)
guide.settle([guide])

def step(plan):
    for end in range(1, len(tokens) + 1):
        guide.biases(tokens[:end])
    thread, pthreads, size = ctypes.create_string_buffer(256), ctypes.CDLL(None), ctypes.c_size_t()
    pthreads.pthread_self.restype = ctypes.c_ulong
    pthreads.pthread_getattr_np(ctypes.c_ulong(pthreads.pthread_self()), thread)
    pthreads.pthread_attr_getstacksize(thread, ctypes.byref(size))
    print("followed on", size.value >> 20)
    done.set()
    return Made(())

runner.launch = step
executor.execute(RunBatch(BatchPlan(1, ())))
assert done.wait(60)
"""


def nested(depth: int) -> str:
    """A terminal whose expression leans to the left, met after some text."""
    rules = "".join(f'L{i}: L{i + 1} "a"\n' for i in range(depth))
    lark = f'start: T0\nT0: /[xy]{{4}}/ L0\n{rules}L{depth}: "b"\n'
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


class Checker:
    """The process that compiles what clients send."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "slipstream.tokenizer.grammar_fork"]
        command += [str(folder), str(WORDS_VOCAB), str(EOS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # that it is ready

    def takes(self, grammar: str) -> bool:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(Question(1, grammar)) + b"\n")
        self._process.stdin.flush()
        return not msgspec.json.decode(self._process.stdout.readline(), type=Reply).refused

    def close(self) -> None:
        self._process.communicate()


def deepest(folder: Path) -> int:
    checker, taken, refused = Checker(folder), 16, 8192
    assert checker.takes(nested(taken)) and not checker.takes(nested(refused))
    while refused - taken > 16:
        middle = (taken + refused) // 2
        if checker.takes(nested(middle)):
            taken = middle
        else:
            refused = middle
    checker.close()
    return taken


@pytest.mark.timeout(180)
def test_what_the_checker_lets_pass_takes_no_worker_with_it(saved: Saved) -> None:
    folder = saved(WORDS)[0]
    tokens = [9, *tokenizer(folder, WORDS_VOCAB, {EOS}).tokenize_str("xyxyba")]
    limited = ["sh", "-c", f'ulimit -s {SYSTEM_STACK_KB}; exec "$@"', "sh", sys.executable]
    given = [str(folder), ",".join(map(str, tokens)), nested(deepest(folder))]
    ran = subprocess.run(
        [*limited, "-c", FOLLOW, *given], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, f"followed on {STACK_BYTES >> 20}\n"), ran.stderr[
        -2000:
    ]
