"""A stack of containers, brought up and taken down by the docker command as a user would."""

import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "compose"
IMAGES = ("python:3.11-slim", "redis:7", "nginx:stable")
UP_S = 300


def missing() -> str | None:
    """Why containers cannot be tried here; None: they can."""
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        return "no Docker engine answers; compose/local-base-images installs one"
    for image in IMAGES:
        if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
            return f"no image {image}; docker pull {image}, or compose/local-base-images"
    return None


class Stack:
    def __init__(self, name: str, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.name = name
        self._env = {**os.environ, "PORT": str(self.port), "BUILD_NETWORK": "host", **variables}

    def compose(self, *words: str, timeout_s: float = UP_S) -> str:
        command = ["docker", "compose", "--env-file", "/dev/null", "-p", self.name]
        return self._run([*command, *words], timeout_s)

    def up(self, **scale: int) -> None:
        counts = [word for role, n in scale.items() for word in ("--scale", f"{role}={n}")]
        try:
            self.compose("up", "--detach", "--wait", "--wait-timeout", str(UP_S), *counts)
        except AssertionError as error:
            logs = self.compose("logs", "--no-color", "--tail", "30")
            raise AssertionError(f"{error}\n{logs}") from None

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans")

    def left(self) -> list[str]:
        """What there is of it: containers, volumes, networks."""
        label = f"label=com.docker.compose.project={self.name}"
        kinds = (["ps", "--all"], ["volume", "ls"], ["network", "ls"])
        return [line for kind in kinds for line in self.docker(*kind, "-q", "-f", label).split()]

    def containers(self, role: str) -> list[str]:
        return self.compose("ps", "--quiet", role).split()

    def docker(self, *words: str) -> str:
        return self._run(["docker", *words], 60)

    def metrics(self, container: str) -> dict[str, float]:
        """Numbers of one process, asked for from inside: its network leads nowhere else."""
        script = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9100/metrics').read().decode())"
        lines = self.docker("exec", container, "python", "-c", script).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def _run(self, command: Sequence[str], timeout_s: float) -> str:
        done = subprocess.run(
            command,
            cwd=FOLDER,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"[-4000:]
        return done.stdout

    # --- Clients ----------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200, f"{path}: {response.status}"
        return json.loads(response.read())

    def ask(self, prompt: str, *, stream: bool, max_tokens: int = 24) -> str:
        """The answer's text. AssertionError: there is none, or not all of it."""
        body = {
            "model": "smollm2-135m-instruct",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read().decode()
        assert response.status == 200, f"{response.status}: {data}"
        if not stream:
            return str(json.loads(data)["choices"][0]["text"])
        events = re.findall(r"^data: (.*)$", data, re.MULTILINE)
        assert events[-1] == "[DONE]", data
        chunks = [json.loads(event) for event in events[:-1]]
        assert not any("error" in chunk for chunk in chunks), data
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert choices[-1]["finish_reason"] == "length", data
        return "".join(choice["text"] for choice in choices)


class Clients:
    """Ask again and again until they are told to stop; every answer has to be the right one."""

    def __init__(self, stack: Stack, answers: dict[str, str], count: int = 3) -> None:
        self._stack, self._answers = stack, answers
        self._stopped = threading.Event()
        self.answered, self.failures = 0, list[str]()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int, timeout_s: float = 120.0) -> None:
        """Until so many more are answered."""
        until, deadline_s = self.answered + more, time.monotonic() + timeout_s
        while self.answered < until and not self.failures:
            assert time.monotonic() < deadline_s, f"{self.answered} answers, {until} are wanted"
            time.sleep(0.1)

    def _ask(self, number: int) -> None:
        prompts = list(self._answers)
        turn = number
        while not self._stopped.is_set():
            prompt, turn = prompts[turn % len(prompts)], turn + 1
            problem = None
            try:
                text = self._stack.ask(prompt, stream=turn % 2 == 0)
                if text != self._answers[prompt]:
                    problem = f"{prompt!r}: {text!r} is not {self._answers[prompt]!r}"
            except (AssertionError, OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            with self._lock:
                self.answered += problem is None
                if problem is not None:
                    self.failures.append(f"at {time.strftime('%X')}: {problem}")
