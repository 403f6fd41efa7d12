"""`slipstream batch`: a file of requests, a file of answers."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from rich.console import Console

from slipstream.cli.batch_file import Answers, Asked, read_requests, refuse_one_file
from slipstream.cli.client_config import BatchConfig, base_url
from slipstream.cli.private_server import server
from slipstream.cli.progress import Advance, progress
from slipstream.cli.run import start_error
from slipstream.client.api import OK, Api, ApiError, is_passing
from slipstream.client.stream import AnswerError
from slipstream.config import Loaded
from slipstream.errors import ExitCode

PROG = "slipstream batch"
BACK_OFF_S, BACK_OFF_MAX_S = 0.5, 30.0


class Batch:
    """What is left of a file, asked by as many as may be at a time."""

    def __init__(self, api: Api, config: BatchConfig, left: list[Asked], answers: Answers) -> None:
        self._api, self._config, self._answers = api, config, answers
        self._left: Iterator[Asked] = iter(left)
        self._all = len(left)
        self.done = self.failed = 0

    async def run(self, advance: Advance) -> None:
        count = min(self._config.concurrency, self._all)
        await asyncio.gather(*(self._ask_on(advance) for _ in range(count)))

    async def _ask_on(self, advance: Advance) -> None:
        for asked in self._left:  # shared: whoever is free takes the next one
            good = await self._ask(asked)  # first: `+=` would read the count before the wait
            self.failed += not good
            self.done += 1
            advance(self.done, self._all)

    async def _ask(self, asked: Asked) -> bool:
        """Until there is an answer that a later try would not better; whether it is a good one."""
        config, wait_s = self._config, BACK_OFF_S
        until_s = time.monotonic() + config.retry_s
        while True:
            status, after_s, said = 0, None, ""
            try:
                reply = await self._api.post(asked.url, asked.body, config.timeout_s)
                status, after_s = reply.status, reply.retry_after_s
            except ApiError as error:
                reply, said = None, str(error)
            pause_s = wait_s if after_s is None else after_s
            if is_passing(status) and time.monotonic() + pause_s < until_s:
                await asyncio.sleep(pause_s)
                wait_s = min(BACK_OFF_MAX_S, 2 * wait_s)
                continue
            if reply is None:
                self._answers.fail(asked, said)
            else:
                self._answers.add(asked, reply)
            return status == OK


def batch(loaded: Loaded, environ: Mapping[str, str]) -> int:
    """FAILED: some requests have no good answer; the output says why. INTERRUPTED by Ctrl-C: what
    was answered by then stands there."""
    config = loaded.config
    assert isinstance(config, BatchConfig)
    requests = read_requests(config.input)
    refuse_one_file(config.input, config.output)
    answers = Answers(config.output)
    with contextlib.closing(answers):
        left = [asked for asked in requests if asked.custom_id not in answers.done]
        if len(left) < len(requests):
            print(f"{len(requests) - len(left)} are answered already", file=sys.stderr)
        if not left:
            return ExitCode.OK
        url = base_url(config.url)
        with server(PROG, url, config.model, loaded.file, environ) as (url, _):
            return asyncio.run(_answered(config, url, left, answers))


async def _answered(config: BatchConfig, url: str, left: list[Asked], answers: Answers) -> int:
    async with Api(url, config.api_key) as api:
        try:
            await api.model()  # or a name that is misspelt would be asked for minutes
        except AnswerError as error:
            raise start_error(PROG, error) from None
        run = Batch(api, config, left, answers)
        with (
            progress(Console(stderr=True), "requests") as advance,
            contextlib.suppress(
                asyncio.CancelledError  # Ctrl-C: what there is stays
            ),
        ):
            await run.run(advance)
    good, of = run.done - run.failed, f"of {len(left)} requests"
    print(f"{good} {of} answered, {run.failed} failed: {config.output}", file=sys.stderr)
    if run.done < len(left):
        print("stopped; the same command goes on with the rest", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if run.failed else ExitCode.OK
