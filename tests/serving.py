"""Servers in processes of their own, asked by OpenAI's own client."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai

import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

FED = Path(__file__).with_name("fed.py")
WAIT_SECONDS = 60
COLD = {"MLX_PROMPTCACHE_MIN_FREE": "0", "MLX_PROMPTCACHE_MAX_SIZE": "20GB"}


@dataclass(frozen=True)
class Answer:
    """What a server said, and what it says that it cost."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    reason: str | None
    sure: tuple[int, ...] = ()
    """Its first tokens that are the likeliest by more than rounding."""


class Server:
    """A server that listens; `fed` is how many tokens went into its models since it was asked."""

    def __init__(
        self, *arguments: str | Path, limit_bytes: int | None = None, slow: str = "0"
    ) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._count = Path(self._directory.name, "fed")
        self._errors = Path(self._directory.name, "errors")

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, FED, self._count, "serve", "--port", "0", "--json",
                 *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=errors, text=True,
                env=processes.environment(**COLD, SLOW=slow), preexec_fn=limited,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.told
        self._client: openai.OpenAI | None = None
        self.url: str = json.loads(line)["url"]

    def client(self, key: str = "none") -> openai.OpenAI:
        """A client with this API key. To make one takes longer than most answers."""
        if self._client is None:
            self._client = openai.OpenAI(
                base_url=self.url, api_key=key, timeout=WAIT_SECONDS, max_retries=0
            )
        return self._client.with_options(api_key=key)

    @property
    def told(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text()

    @property
    def notices(self) -> list[str]:
        return [line for line in self.told.splitlines() if line.startswith("mlx-promptcache: ")]

    def fed(self) -> int:
        """How many tokens were fed to its models since this was asked last."""
        lines = self._count.read_text().splitlines()
        self._count.write_text("")
        return sum(map(int, lines))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.gone()

    def gone(self) -> int:
        """Wait until it is gone, and return the exit code."""
        code = self.process.wait(WAIT_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def ask(self, *messages: str, key: str = "none", stream: bool = False, **more: Any) -> Answer:
        """Ask with a chat whose turns are the user's and the model's by turns."""
        roles = ("user", "assistant")
        chat: list[Any] = [
            {"role": roles[i % 2], "content": text} for i, text in enumerate(messages)
        ]
        options: dict[str, Any] = {"model": "default_model", "max_tokens": 8, **more}
        if stream:
            return streamed(self.client(key), chat, options)
        reply = self.client(key).chat.completions.create(
            messages=chat, logprobs=True, top_logprobs=2, **options
        )
        choice, usage = reply.choices[0], reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        likeliest = choice.logprobs.content if choice.logprobs else []
        return Answer(
            choice.message.content or "", usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0, usage.completion_tokens,
            choice.finish_reason, _sure(likeliest or []),
        )  # fmt: skip


def streamed(client: openai.OpenAI, chat: list[Any], options: dict[str, Any]) -> Answer:
    """The same, piece by piece."""
    text, reason, usage = "", None, None
    for chunk in client.chat.completions.create(
        messages=chat, stream=True, stream_options={"include_usage": True}, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert usage is not None
    cached = usage.prompt_tokens_details.cached_tokens
    return Answer(text, usage.prompt_tokens, cached, usage.completion_tokens, reason)


def _sure(tokens: list[Any], margin: float = 1e-2) -> tuple[int, ...]:
    found = []
    for token in tokens:
        likeliest = sorted((top.logprob for top in token.top_logprobs), reverse=True)
        if likeliest[0] - likeliest[1] < margin:
            break
        found.append(token.id)
    return tuple(found)


@contextlib.contextmanager
def serving(*arguments: str | Path, **limits: Any) -> Iterator[Server]:
    """A server, as long as this lasts."""
    server = Server(*arguments, **limits)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
        server._directory.cleanup()
