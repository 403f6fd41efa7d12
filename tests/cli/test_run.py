"""`slipstream run`: one answer on stdout, its numbers on stderr."""

import io
import json
from pathlib import Path

import pytest

from cli.fake_server import MODEL, FakeServer
from slipstream.cli.answers import printable
from slipstream.cli.main import main
from slipstream.cli.models import Model
from slipstream.cli.private_server import serve_flags
from slipstream.errors import ExitCode

Capture = pytest.CaptureFixture[str]


def test_the_answer_and_its_numbers(fake: FakeServer, capsys: Capture) -> None:
    assert main(["run", "--url", f"{fake.url}/v1/", "hi you"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there.\n"
    assert err.startswith("first token ") and "3 tokens" in err
    assert "(2 cached) · prefill-0>decode-0 · stop\n" in err
    (body,) = fake.asked
    assert body["messages"] == [{"role": "user", "content": "hi you"}]
    assert body["model"] == MODEL and body["stream"]
    assert not {"temperature", "seed", "max_tokens"} & body.keys()


def test_what_is_set_is_sent(fake: FakeServer) -> None:
    flags = ["--temperature", "0", "--seed", "7", "--max-tokens", "9", "--system", "Be brief."]
    assert main(["run", MODEL, "--url", fake.url, *flags, "hi"]) == 0
    (body,) = fake.asked
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 7, 9)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_model_that_the_server_has_not(fake: FakeServer, capsys: Capture) -> None:
    assert main(["run", "fake-2b", "hi", "--url", fake.url]) == ExitCode.MODEL
    said = f"{fake.url} has no model fake-2b (did you mean {MODEL}?); there: {MODEL}\n"
    assert capsys.readouterr().err == f"slipstream run: {said}"


def test_json(fake: FakeServer, capsys: Capture) -> None:
    assert main(["run", "--url", fake.url, "--json", "hi"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["text"], said["finish_reason"], said["output_tokens"]) == (
        *("Hello there.", "stop"),
        3,
    )
    assert err == ""


def test_the_prompt_from_standard_input(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nhere"))
    assert main(["run", "-", "--url", fake.url]) == 0
    assert fake.asked[0]["messages"][0]["content"] == "from\nhere"
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert main(["run", "-", "--url", fake.url]) == ExitCode.USAGE
    assert capsys.readouterr().err.endswith("slipstream run: no prompt on standard input\n")


def test_one_word_is_the_prompt_and_the_model_stays_as_set(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_MODEL", MODEL)
    assert main(["run", "hi", "--url", fake.url]) == 0
    assert fake.asked[0]["messages"][0]["content"] == "hi"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "PROMPT is missing"),
        (["run", "demo"], 2, "demo is a model; a prompt is missing"),
        (["run", "/nowhere/m", "hi"], 4, "slipstream run: /nowhere/m: no such folder or file"),
        (["run", "hi", "--url", "localhost:8000"], 2, "--url: expected http://host:port"),
        (["run", "hi", "--url", "http://h:99999"], 2, "--url: expected http://host:port"),
        (
            ["run", "hi", "--url", "http://127.0.0.1:9"],
            3,
            "no server at http://127.0.0.1:9: Connection refused; start one (slipstream serve), "
            "or name another by --url",
        ),
        (["run", "hi", "--temprature", "1"], 2, "did you mean --temperature?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: int, said: str, capsys: Capture) -> None:
    assert main(words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.startswith("slipstream run: ")


@pytest.mark.parametrize("fault", ["refused", "cut", "error"])
def test_an_answer_that_fails_is_not_passed_off_as_one(
    fake: FakeServer, fault: str, capsys: Capture
) -> None:
    fake.fault = fault
    assert main(["run", "hi", "--url", fake.url]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert "Hello there.".startswith(out.removesuffix("\n"))
    assert err.startswith("slipstream run: ") and err.count("\n") == 1


def test_a_model_cannot_write_to_the_terminal() -> None:
    assert printable("a\tb\nä\x1b]0;x\x07\x9b2J\r") == "a\tb\nä�]0;x��2J�"


def test_a_private_server_is_one_worker_unless_told_otherwise(tmp_path: Path) -> None:
    model = Model(tmp_path, "toy")

    def flags(**environ: str) -> dict[str, str]:
        words = serve_flags(model, "", {f"SLIPSTREAM_{k}": v for k, v in environ.items()})
        return dict(zip(words[::2], words[1::2], strict=True))

    ours = flags()
    assert (ours["--prefill"], ours["--kvindex"], ours["--frontend"]) == ("0", "0", "1")
    assert ours["--served-model-name"] == "toy" and ours["--host"] == "127.0.0.1"
    assert "--prefill" not in flags(PREFILL="2")
    assert "--prefill" not in flags(DISAGGREGATION="always")
    assert flags(SERVED_MODEL_NAME="mine")["--served-model-name"] == "mine"
    file = tmp_path / "c.toml"
    file.write_text("[serve]\nkvindex = 1\n")
    assert "--kvindex" not in serve_flags(model, str(file), {})


def test_what_the_model_thinks_is_beside_the_answer(fake: FakeServer, capsys: Capture) -> None:
    fake.thoughts = ["They", " greet."]
    assert main(["run", "--url", fake.url, "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there.\n" and err.startswith("They greet.\nfirst token ")
    assert "5 tokens" in err
    assert main(["run", "--url", fake.url, "--json", "hi"]) == 0
    assert json.loads(capsys.readouterr().out)["reasoning"] == "They greet."


def test_an_answer_of_thoughts_alone_has_tokens(fake: FakeServer, capsys: Capture) -> None:
    fake.thoughts, fake.words = ["So", "..."], []
    words = ["bench", "--url", fake.url, "--requests", "2", "--api", "chat"]
    assert main(words) == 0, capsys.readouterr()
