"""The lab's web server: ``python -m tidegate.lab.webserver ADDRESS [ADDRESS…] --port 80``.

- ``GET /`` answers with one short line (for connections per second).
- ``GET /blob/SEED/SIZE`` answers with that content of `tidegate.lab.blob`; ``Range`` is supported.
- ``PUT /upload`` answers with the length and SHA-256 of what arrived, as JSON.
- ``GET /whoami`` answers with the address and port that the request came from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from tidegate.lab.blob import CHUNK, blob

GREETING = b"Hello from the far side of the tide gate.\n"
READY = "web server is ready"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tidegate-lab"
    timeout = 60

    def do_GET(self) -> None:
        if wanted := re.fullmatch(r"/blob/([\w.-]+)/(\d{1,13})", self.path):
            self._send_blob(wanted[1], int(wanted[2]))
        elif self.path == "/whoami":
            address, port = self.client_address[:2]
            self._send(json.dumps({"address": address, "port": port}).encode(), "application/json")
        elif self.path == "/":
            self._send(GREETING, "text/plain")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length")
        if length is None or not length.isdigit():
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
            return
        digest, remaining = hashlib.sha256(), int(length)
        while remaining and (chunk := self.rfile.read(min(CHUNK, remaining))):
            digest.update(chunk)
            remaining -= len(chunk)
        answer = {"bytes": int(length) - remaining, "sha256": digest.hexdigest()}
        self._send(json.dumps(answer).encode(), "application/json")

    def _send_blob(self, seed: str, size: int) -> None:
        start = 0
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = min(int(span[1]), size)
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        for chunk in blob(seed, size, offset=start):
            self.wfile.write(chunk)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: 100 parallel downloads and a benchmark would fill the log."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True
    address_family = socket.AF_INET

    def server_bind(self) -> None:
        """Binds without looking up the server's own name in the DNS, as `HTTPServer` would."""
        TCPServer.server_bind(self)


def main() -> None:
    """Serves until it is ended by a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--port", type=int, default=80)
    arguments = parser.parse_args()
    servers = [_Server((address, arguments.port), _Handler) for address in arguments.addresses]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    print(READY, flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
