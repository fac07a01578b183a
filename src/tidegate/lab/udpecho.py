"""The lab's UDP echo server: ``python -m tidegate.lab.udpecho ADDRESS [--port 7]``.

Every datagram goes back to where it came from; ``whoami`` is answered with that address and port.
"""

from __future__ import annotations

import argparse
import socket

PORT = 7  # RFC 862
READY = "UDP echo server is ready"
WHOAMI = b"whoami"


def main() -> None:
    """Serves until it is ended by a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address")
    parser.add_argument("--port", type=int, default=PORT)
    arguments = parser.parse_args()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((arguments.address, arguments.port))
        print(READY, flush=True)
        while True:
            data, sender = server.recvfrom(65535)
            answer = f"{sender[0]}:{sender[1]}".encode() if data == WHOAMI else data
            try:
                server.sendto(answer, sender)
            except OSError as error:  # the MTU has shrunk, or there is no route back: report it, and go on
                print(f"to {sender[0]}:{sender[1]}: {error}", flush=True)


if __name__ == "__main__":
    main()
