"""`slipstream chat`: a conversation in the terminal, or line by line from a pipe."""

import asyncio
import sys
from collections.abc import Mapping

from slipstream.cli.answers import Answer, Sampling, Screen, follow
from slipstream.cli.chat_state import Conversation, Said
from slipstream.cli.client_config import ChatConfig, base_url
from slipstream.cli.private_server import server
from slipstream.cli.run import start_error
from slipstream.client.api import Api, ApiError, ModelCard
from slipstream.client.stream import AnswerError
from slipstream.config import Loaded
from slipstream.errors import ErrorCode, ExitCode

PROG = "slipstream chat"
_PROMPT = ">>> "
_LENGTH = "length"


def chat(loaded: Loaded, environ: Mapping[str, str]) -> int:
    """Until the input ends. FAILED: input was no terminal, and an answer or a command failed."""
    config = loaded.config
    assert isinstance(config, ChatConfig)
    asked = server(PROG, base_url(config.url), config.model, loaded.file, environ)
    # One loop for the whole conversation, turned only while an answer is due.
    with asked as (url, model), asyncio.Runner() as runner:
        try:
            card = runner.run(_card(url, config.api_key, model))
        except AnswerError as error:
            raise start_error(PROG, error) from None
        return _Chat(config, url, card, runner).converse()


async def _card(url: str, api_key: str, model: str) -> ModelCard:
    async with Api(url, api_key) as api:
        return await api.model(model)


class _Chat:
    def __init__(
        self, config: ChatConfig, url: str, card: ModelCard, runner: asyncio.Runner
    ) -> None:
        self._conversation = Conversation(config.system, Sampling.of(config))
        self._url, self._api_key, self._card, self._runner = url, config.api_key, card, runner
        self._by_hand = sys.stdin.isatty() and sys.stdout.isatty()
        self._failed = False

    def converse(self) -> int:
        if self._by_hand:
            import readline  # noqa: F401 (gives `input` its history and editing; kept in memory)

            context = f", context {self._card.max_model_len} tokens" * bool(
                self._card.max_model_len
            )
            self._note(f"{self._card.id}{context}. /help lists commands, Ctrl-D ends.")
        while (line := self._line()) is not None:
            said = self._conversation.take(line)
            if said.over:
                break
            self._tell(said)
        return ExitCode.FAILED if self._failed and not self._by_hand else ExitCode.OK

    def _line(self) -> str | None:
        """None: there are no more."""
        if not self._by_hand:
            return sys.stdin.readline() or None
        try:
            return input(_PROMPT)
        except EOFError:
            print(flush=True)
            return None
        except KeyboardInterrupt:
            self._note("\nCtrl-D or /quit ends the chat.")
            return ""

    def _tell(self, said: Said) -> None:
        self._failed |= said.failed
        if said.text:
            self._note(said.text)
        if said.ask:
            self._ask()

    def _ask(self) -> None:
        answer, screen = Answer(), Screen()
        problem, stopped = "", False
        try:
            self._runner.run(self._answer(answer, screen))
        except KeyboardInterrupt:
            if not self._by_hand:
                raise
            stopped = True
        except AnswerError as error:
            problem = self._explained(error)
        screen.end()
        self._conversation.answered(answer.text)
        if problem:
            self._failed = True
            self._note(problem)
        elif stopped:
            self._note(
                "stopped"
                if answer.text or answer.reasoning
                else "stopped before the first token; not asked"
            )
        else:
            self._note(self._numbers(answer))

    async def _answer(self, answer: Answer, screen: Screen) -> None:
        conversation = self._conversation
        async with Api(self._url, self._api_key) as api:
            messages, sampling = conversation.messages, conversation.sampling
            await follow(api, self._card.id, messages, sampling, answer, screen)

    def _numbers(self, answer: Answer) -> str:
        line, room = answer.numbers(), self._card.max_model_len
        used = answer.prompt_tokens + answer.output_tokens
        if room:
            line += f" · context {used} of {room}"
        if answer.finish_reason == _LENGTH:
            if room and used >= room:
                line += f"\ncut: the context of {room} tokens is full; /clear begins anew"
            else:
                line += f"\ncut after {answer.output_tokens} tokens; /set max_tokens auto, /retry"
        return line

    def _explained(self, error: AnswerError) -> str:
        """With what to do about it."""
        if isinstance(error, ApiError):
            if error.code == ErrorCode.CONTEXT_LENGTH:
                return f"{error} /clear forgets the conversation; /set max_tokens asks for less."
            if error.retry_after_s is not None:
                return f"{error} Again in {error.retry_after_s:g} s."
            if not error.status:
                return f"no server at {error}; the conversation is kept, ask again"
        return str(error)

    def _note(self, text: str) -> None:
        """Beside the answers: on stderr, so that a pipe gets answers alone."""
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)
