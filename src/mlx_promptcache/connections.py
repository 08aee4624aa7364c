"""Connections to a server: who is in gets an answer, also when the server is to end."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger("mlx_promptcache")

SILENT_SECONDS = 1.0  # what a connection that has asked nothing yet is waited for
POLL_SECONDS = 0.05
WAITING_CONNECTIONS = 128  # as many clients may come at once; of more than 5 Python turns some away


@dataclass(frozen=True)
class Ending:
    """How a server begins and ends: it is announced with its host and port, gives the answers that
    have begun for at most so many `seconds`, and ends by itself when that is `wanted`.
    """

    seconds: float
    announce: Callable[[str, int], None]
    wanted: Callable[[], bool]


class Connections(ThreadingHTTPServer):
    """Listens until a signal comes; then nobody else gets in, and those who are in get their
    answers, for as long as may be.
    """

    ending: ClassVar[Ending]
    request_queue_size = WAITING_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._count = threading.Lock()
        self._open = self._answering = 0
        super().__init__(*args, **kwargs)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While this lasts an answer is given."""
        with self._count:
            self._answering += 1
        try:
            yield
        finally:
            with self._count:
                self._answering -= 1

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in a thread of its own."""
        with self._count:
            self._open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in this thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Tell of an error in one line; a client that went away is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            log.warning("a request could not be answered: %s: %s", type(error).__name__, error)

    def service_actions(self) -> None:
        """Look whether there is no more use in serving."""
        if self.ending.wanted():
            threading.Thread(target=self.shutdown).start()

    def serve_forever(self, poll_interval: float = POLL_SECONDS) -> None:
        """Serve until SIGTERM or SIGINT comes, and give the answers that have begun."""
        host, port = self.server_address[:2]
        self.ending.announce(str(host), port)
        with self._until_a_signal():
            super().serve_forever(poll_interval)
        self.server_close()
        self._finish()

    @contextlib.contextmanager
    def _until_a_signal(self) -> Iterator[None]:
        """The first signal ends the serving; after it they do what they did before."""
        before: dict[int, Any] = {}

        def end(number: int, frame: Any) -> None:  # noqa: ARG001
            for each, handler in before.items():
                signal.signal(each, handler)
            threading.Thread(target=self.shutdown).start()

        for wanted in (signal.SIGTERM, signal.SIGINT):
            before[wanted] = signal.signal(wanted, end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < self.ending.seconds:
            with self._count:
                silent = self._open - self._answering
                busy = self._answering or (silent and time.monotonic() - began < SILENT_SECONDS)
            if not busy:
                return
            time.sleep(POLL_SECONDS)
        log.warning("%d answers were broken off: they took too long", self._answering)
