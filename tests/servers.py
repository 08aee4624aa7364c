"""Real servers on loopback, each in a process of its own: S3 and SFTP.

python tests/servers.py s3|sftp DIRECTORY     prints its port, and serves until it is ended
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
REPO = "team/caches"
USER, PASSWORD = "me", "sesame"


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[int]:
    """The port of a server that serves meanwhile."""
    process = subprocess.Popen(
        [sys.executable, __file__, kind, str(directory)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _s3() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    while True:
        time.sleep(60)


def _sftp(directory: str) -> None:
    import asyncssh

    class Server(asyncssh.SSHServer):  # type: ignore[misc]
        def begin_auth(self, username: str) -> bool:
            return True

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == (USER, PASSWORD)

    def files(channel: asyncssh.SSHServerChannel) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(channel, chroot=directory.encode())

    async def serve() -> None:
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.create_server(
            Server, HOST, 0, server_host_keys=[key], sftp_factory=files
        )
        print(server.get_port(), flush=True)
        await server.wait_closed()

    asyncio.run(serve())


class Hub(BaseHTTPRequestHandler):
    """One data set, as the client sees it: `preupload`, `commit`, `tree`, `paths-info`, files.

    The files are in a directory. Each commit is a line of `commits`: how many files it had.
    """

    directory: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/tree/" in path:
            self._tree(path.partition("/tree/")[2].partition("/")[2])
        elif "/resolve/" in path:
            self._file(path.partition("/resolve/")[2].partition("/")[2])
        else:
            self._say({"id": REPO, "sha": "0" * 40, "private": False, "siblings": []})

    do_HEAD = do_GET  # noqa: N815 - as the class above wants it

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._say({"files": [{"path": f["path"], "uploadMode": "regular",
                                  "shouldIgnore": False} for f in files]})  # fmt: skip
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            paths = [self.directory / path for path in json.loads(body)["paths"]]
            self._say([self._told(path) for path in paths if path.exists()])

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        for file in files:
            path = self.directory / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(file["content"]))
        with (self.directory.parent / "commits").open("a") as commits:
            commits.write(f"{len(files)}\n")
        url = f"http://{self.headers['Host']}/datasets/{REPO}/commit/{'0' * 40}"
        self._say({"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})

    def _tree(self, place: str) -> None:
        directory = self.directory / place
        if not directory.is_dir():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        every = "recursive=True" in self.path or "recursive=true" in self.path
        self._say(
            [self._told(path) for path in (directory.rglob("*") if every else directory.iterdir())]
        )

    def _told(self, path: Path) -> dict[str, Any]:
        told = {"path": path.relative_to(self.directory).as_posix()}
        if path.is_dir():
            return {**told, "type": "directory", "oid": "0" * 40, "size": 0}
        data = path.read_bytes()
        return {**told, "type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def _file(self, path: str) -> None:
        data = (self.directory / path).read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        piece = data[int(first or 0) : int(last) + 1 if last else len(data)]
        self.send_response(206 if first else 200)
        self.send_header("ETag", hashlib.sha1(data).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(piece)

    def _say(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Standard error is nobody's here."""


def _hub(directory: str) -> None:
    Hub.directory = Path(directory) / "files"
    Hub.directory.mkdir()
    server = ThreadingHTTPServer((HOST, 0), Hub)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "s3":
        _s3()
    elif sys.argv[1] == "hub":
        _hub(sys.argv[2])
    else:
        _sftp(sys.argv[2])
