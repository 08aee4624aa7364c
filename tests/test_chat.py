"""`chat` as people and scripts use it: in processes of its own, at a terminal and in a pipe."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

import processes
import tiny
from mlx_promptcache import cli
from mlx_promptcache.cli.markdown import Rendered, split_blocks
from mlx_promptcache.cli.terminal import Lines, entry
from mlx_promptcache.errors import PromptError
from mlx_promptcache.store import BLOCKS, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

GREEDY = ("-n", "6", "--temp", "0")
WAIT_SECONDS = 60.0
PRESS_SECONDS = 10.0  # until a key is pressed again
SAME = ("--temp", "0", "--logit-bias", "59=300")  # says one letter again and again
SAID = "ZZZ"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.on_disk(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def chat(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs `chat` in this process, as in a pipe."""

    def run(said: str, *arguments: str) -> processes.Ended:
        stdin = io.TextIOWrapper(io.BytesIO(said.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        chosen = ["-m", str(model), "--cache-dir", str(tmp_path / "store"), *GREEDY]
        code = cli.run(["chat", *chosen, *arguments])
        return processes.Ended(code, *capsys.readouterr())

    return run


# Entries


def entries(*lines: str) -> list[str]:
    """All entries that these lines make."""
    left = list(lines)

    def read(prompt: str) -> str | None:
        assert prompt in {"> ", ". "}
        return left.pop(0) if left else None

    found = []
    while (one := entry(read)) is not None:
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a\\", "b", "c"], ["a\nb", "c"]),
        (["a\\", "b\\", "c"], ["a\nb\nc"]),
        (["a\\"], ["a\n"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['"""a', 'b"""', "c"], ["a\nb", "c"]),
        (['"""a b"""'], ["a b"]),
        (['"""', "a\\", '"""'], ["a\\"]),
        (['"""', "a"], ["a"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_an_entry_is_a_line_or_several(lines: list[str], expected: list[str]) -> None:
    assert entries(*lines) == expected


def test_what_is_no_text_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n")))
    with pytest.raises(PromptError, match="not UTF-8"):
        Lines(interactive=False).read()


# Markdown


@pytest.mark.parametrize(
    ("text", "done", "rest"),
    [
        ("a", "", "a"),
        ("a\n\n", "a", ""),
        ("a\n\nb", "a", "b"),
        ("a\n\nb\n\nc", "a\n\nb", "c"),
        ("```\na\n\nb", "", "```\na\n\nb"),
        ("a\n\n```\nb\n\nc", "a", "```\nb\n\nc"),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```", "c"),
        ("~~~\n```\n\n", "", "~~~\n```\n\n"),
        ("a\n", "", "a\n"),
    ],
)
def test_what_can_still_change_is_drawn_again(text: str, done: str, rest: str) -> None:
    assert split_blocks(text) == (done, rest)


def test_markdown_ends_up_rendered_however_it_came() -> None:
    text = "# Cats\n\nThey are **soft**.\n\n```\nmeow\n\nmeow\n```\n\n* one\n* two\n"

    def shown(size: int) -> str:
        out = io.StringIO()
        view = Rendered(Console(file=out, force_terminal=True, width=60, height=20))
        for i in range(0, len(text), size):
            view.add(text[i : i + size])
        view.finish()
        return out.getvalue().rpartition("\x1b[2K")[2] if size == len(text) else out.getvalue()

    assert "**" not in shown(3).replace("**s", "")
    for word in ("Cats", "soft", "meow", "one", "two"):
        assert word in shown(1)
    assert "\x1b[1msoft\x1b[0m" in shown(7)


# In a pipe


def test_a_script_gets_the_answers_and_nothing_else(chat: Any) -> None:
    told = chat("The cat\n\nAnd the dog?\n/quit\nnever asked\n", "--json").json
    texts = [exchange["text"] for exchange in told["exchanges"]]
    assert len(texts) == 2
    ended = chat("The cat\nAnd the dog?\n/quit\n", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "".join(f"{text}\n" for text in texts), "")


def test_a_session_goes_on_in_another_process(chat: Any) -> None:
    chat("The cat\n", "--session", "s")
    told = chat("And the dog?\n", "--session", "s", "--json").json
    assert told["session"] == "s"
    assert told["restored_tokens"] > 0
    assert [m["role"] for m in told["messages"]] == ["user", "assistant"] * 2
    (exchange,) = told["exchanges"]
    assert exchange["cached_tokens"] >= told["restored_tokens"] - 6  # what it said, encoded anew
    assert exchange["cached_tokens"] + exchange["prefilled_tokens"] == exchange["prompt_tokens"]


def test_commands_are_told_and_their_answers_are_not_the_models(chat: Any) -> None:
    asked = "a\nb\n/undo\n/stats\n/branch other\n/save kept\n/edit c\n/retry\n/help\n"
    ended = chat(asked, "--session", "s")
    assert ended.code == 0
    assert len(ended.out.splitlines()) >= 4
    for told in (
        "1 taken back, 1 left", "tokens held", "the session other now", "named kept",
        "/branch NAME", "at temperature 0 the answer is the same",
    ):  # fmt: skip
        assert told in ended.err
        assert told not in ended.out


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("/nonsense\n", "there is no command /nonsense"),
        ("/undo two\n", "/undo takes a number"),
        ("/undo 0\n", "/undo takes a number"),
        ("/edit\n", "nothing was asked yet"),
        ("/retry\n", "nothing was asked yet"),
        ("a\n/edit\n", "nothing was changed"),
        ("/branch a\n", "ask something first"),
        ("a\n/save a/b\n", "cannot be a name"),
        ("cat " * 2100 + "\n", "context ends at 2048"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_talk_goes_on(
    said: str, sentence: str, chat: Any
) -> None:
    ended = chat(f"{said}the dog\n", "--session", "s", "--quiet")
    assert ended.code == 1  # a script is told
    assert sentence in ended.err
    assert len(ended.err.splitlines()) == 1
    assert ended.out


def test_a_slash_can_begin_a_question(chat: Any) -> None:
    told = chat("//undo is a word\n", "--json").json
    assert told["messages"][0]["content"] == "/undo is a word"


def test_an_answer_that_is_cut_short_says_why(chat: Any) -> None:
    assert "--max-tokens is 6" in chat("The cat\n").err
    assert "context is full" in chat("cat " * 2010 + "\n", "-n", "500").err


@pytest.mark.parametrize("arguments", [("--session", "a/b"), ("--temp", "-1")])
def test_wrong_options_are_told_before_the_model_is_loaded(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["chat", "-m", str(tmp_path / "none"), *arguments]) in {1, 2}
    assert "model" not in capsys.readouterr().err


# At a terminal


class Terminal:
    """`chat` in a process of its own, at a terminal of its own."""

    def __init__(self, model: Path, store: Path, *arguments: str) -> None:
        mine, theirs = pty.openpty()
        chosen = ["-m", str(model), "--cache-dir", str(store), "--session", "s", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_promptcache", "chat", *chosen],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=_as_a_shell, env=processes.environment(TERM="xterm"),
        )  # fmt: skip
        os.close(theirs)
        self._fd, self._left = mine, ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def press(self, key: str, text: str) -> None:
        """Press a control key, and again until this is shown: Python's line editing notes a Ctrl-C
        that comes right after its prompt with the next key only.
        """
        for _ in range(int(WAIT_SECONDS / PRESS_SECONDS)):
            self.type(key)
            if self._shows(text, PRESS_SECONDS):
                break
        self.until(text)

    def until(self, text: str) -> str:
        """Read until this is shown; return all that was since the last time."""
        assert self._shows(text, WAIT_SECONDS), f"{text!r} was not shown: {self._left!r}"
        shown, _, self._left = self._left.partition(text)
        return shown + text

    def _shows(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self._left and time.monotonic() < end:
            if select.select([self._fd], [], [], 0.2)[0]:
                self._left += os.read(self._fd, 4096).decode(errors="replace")
        return text in self._left

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> int:
        code = self.process.wait(WAIT_SECONDS)
        os.close(self._fd)
        return code


def _as_a_shell() -> None:
    """What a shell at a terminal does before it starts a program: so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it


@pytest.fixture
def terminal(model: Path, tmp_path: Path) -> Iterator[Any]:
    started = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(model, tmp_path / "store", *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


def test_a_talk_at_a_terminal_survives_a_kill_in_the_middle_of_an_answer(
    terminal: Any, tmp_path: Path, chat: Any
) -> None:
    first = terminal(*GREEDY)
    first.until("> ")
    first.type("The cat sat\\\non the mat.\n")
    first.until("--max-tokens is 6")
    first.until("> ")
    first.type("\x04")  # Ctrl-D
    assert first.close() == 0
    second = terminal("-n", "2000", *SAME)
    assert "1 exchange" in second.until("> ")
    stored = Store(tmp_path / "store")
    before = set(stored.stems(BLOCKS))
    second.type("And the dog?\n")
    second.until(SAID)
    second.kill()
    assert set(stored.stems(BLOCKS)) > before  # the question's
    third = terminal(*GREEDY)
    assert "the last question has no answer" in third.until("> ")
    third.type("/retry\n")
    third.until("--max-tokens is 6")
    third.until("> ")
    third.type("/quit\n")
    assert third.close() == 0
    told = chat("", "--session", "s", "--json").json
    assert [m["content"] for m in told["messages"][::2]] == [
        "The cat sat\non the mat.", "And the dog?",
    ]  # fmt: skip
    assert told["messages"][-1]["role"] == "assistant"


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(terminal: Any, chat: Any) -> None:
    talk = terminal("-n", "2000", *SAME)
    talk.until("> ")
    talk.type("The cat\n")
    talk.until(SAID)
    talk.type("\x03")
    talk.until("what was said is kept")
    talk.until("> ")
    talk.press("\x03", "Ctrl-D or /quit ends")  # at the prompt it only says how to end
    talk.type("/edit\n")
    talk.until("> The cat")  # typed already
    talk.type("!\n")
    talk.until(SAID)
    talk.type("\x03")
    talk.until("what was said is kept")
    talk.until("> ")
    talk.type("\x04")
    assert talk.close() == 0
    told = chat("", "--session", "s", "--json").json
    assert [m["role"] for m in told["messages"]] == ["user", "assistant"]
    assert told["messages"][0]["content"] == "The cat!"
    assert 0 < len(told["messages"][1]["content"]) < 2000


def test_ctrl_c_in_a_script_ends_it_and_keeps_what_was_said(
    model: Path, tmp_path: Path, chat: Any
) -> None:
    chosen = ["-m", str(model), "--cache-dir", str(tmp_path / "store"), "--session", "s"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_promptcache", "chat", *chosen, "-n", "2000", *SAME],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=processes.environment(), bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"The cat\nnever asked\n")
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, err
    told = chat("", "--session", "s", "--json").json
    assert len(told["messages"]) == 2
    assert told["messages"][1]["content"] == (first + out).decode().removesuffix("\n")
