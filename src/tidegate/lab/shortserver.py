"""The benchmark's server for short connections: ``python -m tidegate.lab.shortserver ADDRESS --port 8080``.

Accepts, reads one request, answers 12 bytes, closes: as little as possible per connection, so that connections are
measured and not the server.
"""

from __future__ import annotations

import argparse
import contextlib
import socket

READY = "short server is ready"
PORT = 8080
_ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\ntide is in.\n"


def main() -> None:
    """Serves until it is ended by a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("--port", type=int, default=PORT)
    arguments = parser.parse_args()
    with socket.create_server((arguments.address, arguments.port), backlog=4096) as server:
        print(READY, flush=True)
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError, TimeoutError):
                connection.settimeout(2)  # a client that says nothing must not stop the next one for long
                connection.recv(4096)
                connection.sendall(_ANSWER)


if __name__ == "__main__":
    main()
