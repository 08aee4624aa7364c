"""Real servers on loopback, each in a process of its own: S3 and SFTP.

python tests/servers.py s3|sftp DIRECTORY     prints its port, and serves until it is ended
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
USER, PASSWORD = "me", "sesame"


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[int]:
    """The port of a server that serves meanwhile."""
    process = subprocess.Popen(
        [sys.executable, __file__, kind, str(directory)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
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

    class Server(asyncssh.SSHServer):
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


if __name__ == "__main__":
    if sys.argv[1] == "s3":
        _s3()
    else:
        _sftp(sys.argv[2])
