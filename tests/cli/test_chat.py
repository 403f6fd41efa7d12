"""`slipstream chat`: what its commands do, line by line from a pipe, and in a terminal."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.fake_server import CONTEXT, FakeServer
from cli.terminal import Terminal
from slipstream.cli.answers import Sampling
from slipstream.cli.chat_state import HELP, Conversation
from slipstream.cli.main import main
from slipstream.errors import ExitCode

Capture = pytest.CaptureFixture[str]


def turns(conversation: Conversation) -> str:
    """`sua`: a system prompt, a question, an answer."""
    return "".join(message["role"][0] for message in conversation.messages)


@pytest.fixture
def talk() -> Conversation:
    conversation = Conversation("Be brief.", Sampling())
    assert conversation.take("What?\n").ask
    conversation.answered("That.")
    return conversation


def test_turns_add_up(talk: Conversation) -> None:
    assert turns(talk) == "sua"
    talk.take("More")
    assert [message["content"] for message in talk.messages] == [
        *("Be brief.", "What?", "That.", "More")
    ]


def test_a_question_without_an_answer_is_taken_back(talk: Conversation) -> None:
    talk.take("More")
    talk.answered("")
    assert turns(talk) == "sua"


def test_clear_keeps_the_system_prompt_and_system_changes_it(talk: Conversation) -> None:
    assert talk.take("/clear").text == "forgotten"
    assert turns(talk) == "s"
    talk.take("/system Rhyme. Always.")
    assert talk.messages == [{"role": "system", "content": "Rhyme. Always."}]
    talk.take("/system")
    assert talk.messages == []


def test_a_retry_that_gets_nothing_leaves_the_answer_that_was_there(talk: Conversation) -> None:
    talk.take("hi")
    talk.answered("hello")
    before = talk.messages
    assert talk.take("/retry").ask
    talk.answered("")
    assert talk.messages == before


def test_retry_asks_the_last_question_again(talk: Conversation) -> None:
    assert talk.take("/retry").ask
    assert turns(talk) == "su"
    talk.take("/clear")
    assert talk.take("/retry").failed


def test_save_overwrites_nothing(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    assert talk.take(f"/save {path}").text == f"3 messages saved in {path}"
    assert json.loads(path.read_text()) == talk.messages
    said = talk.take(f"/save {path}")
    assert said.failed and said.text == f"{path} is there already; take another name"
    assert not talk.take(f"/save {tmp_path / 'talk.txt'}").failed
    assert (tmp_path / "talk.txt").read_text().startswith("system:\nBe brief.\n\nuser:\nWhat?")
    assert talk.take(f"/save {tmp_path / 'no' / 'x'}").text.endswith("No such file or directory")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature 0.2", "temperature 0.2, top_p auto, max_tokens auto, seed auto"),
        ("/set max-tokens 20", "temperature auto, top_p auto, max_tokens 20, seed auto"),
        ("/set", "temperature auto, top_p auto, max_tokens auto, seed auto"),
        ("/help", HELP),
    ],
)
def test_settings(talk: Conversation, line: str, said: str) -> None:
    got = talk.take(line)
    assert (got.text, got.failed, got.ask) == (said, False, False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature 3", "expected a number from 0 to 2 or auto, got 3"),
        ("/set max_tokens 1.5", "expected an int from 1 to"),
        ("/set top_p", "got nothing"),
        ("/set temprature 1", "(did you mean temperature?)"),
        ("/sett x", "unknown command /sett (did you mean /set?); /help lists them"),
        ("/save", "a file is missing"),
    ],
)
def test_mistakes(talk: Conversation, line: str, said: str) -> None:
    got = talk.take(line)
    assert got.failed and said in got.text
    assert talk.sampling == Sampling() and turns(talk) == "sua"


def test_auto_takes_a_setting_back(talk: Conversation) -> None:
    talk.take("/set seed 4")
    assert talk.sampling.sent() == {"seed": 4}
    talk.take("/set seed auto")
    assert talk.sampling.sent() == {}


def piped(monkeypatch: pytest.MonkeyPatch, fake: FakeServer, text: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", "--url", fake.url])


def test_a_pipe_is_answered_line_by_line(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code = piped(monkeypatch, fake, "one\n\n/set temperature 0\ntwo\n/quit\nthree\n")
    out, err = capsys.readouterr()
    assert (code, out) == (0, "Hello there.\nHello there.\n")
    first, second = fake.asked
    assert len(first["messages"]) == 1 and "temperature" not in first
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert second["temperature"] == 0
    assert f"of {CONTEXT}" in err and "\x1b" not in out + err


def test_a_full_context_is_said_with_numbers_and_the_way_out(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake.fault = "overflow"
    assert piped(monkeypatch, fake, "one\n/clear\n") == ExitCode.FAILED
    err = capsys.readouterr().err
    assert f"maximum context length is {CONTEXT} tokens. /clear forgets the conversation" in err


def test_what_fails_is_not_part_of_the_conversation(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake.refusals = 1
    assert piped(monkeypatch, fake, "one\ntwo\n") == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert out == "Hello there.\n" and "HTTP 429: Too many requests wait. Again in 1 s." in err
    assert [m["content"] for m in fake.asked[1]["messages"]] == ["two"]


@pytest.fixture
def terminal(fake: FakeServer) -> Iterator[Terminal]:
    found = Terminal("chat", "--url", fake.url)
    yield found
    found.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(fake: FakeServer, terminal: Terminal) -> None:
    terminal.until(">>> ")
    fake.words, fake.pause_s = ["word "] * 1000, 0.05
    terminal.type("hello\n")
    terminal.until("word word")
    terminal.type("\x03")
    terminal.until("stopped")
    fake.words, fake.pause_s = ["Fine."], 0.0
    terminal.type("and now?\n")
    terminal.until("Fine.")
    roles = [message["role"] for message in fake.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert fake.asked[-1]["messages"][1]["content"].startswith("word ")
    assert fake.broken_off == 1
    terminal.until(">>>", 3)  # not in what is left of the answer
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit ends the chat.")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_the_arrow_brings_the_last_line_back(fake: FakeServer, terminal: Terminal) -> None:
    terminal.until(">>> ")
    terminal.type("first\n")
    terminal.until("stop")
    terminal.type("\x1b[A\n")
    terminal.until("stop", 2)
    assert [body["messages"][-1]["content"] for body in fake.asked] == ["first", "first"]
