"""A proxy before a real HTTP server that spoils what is asked of it: each fault for some requests, a number of times.

with Faults(server.port) as proxy:
    proxy.add(Fault("503", match=r"PUT .*safetensors", times=2))
    ...
    assert proxy.seen("PUT .*safetensors") == 3
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENDLESS = 10**9
S3_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"


@dataclass
class Fault:
    """What happens to a request whose "METHOD path" matches, after `spare` of them have gone well.

    `503`, `403` and the like answer so and do nothing, as S3 if a `code` is given. `refuse` closes the connection.
    `lose` lets the server do it and drops the answer. `cut` closes after `at` bytes of the answer's body, `damage`
    turns one byte of it over. `stall` sends `at` bytes and then nothing for `seconds`; `delay` waits before it passes
    the request on.
    """

    kind: str
    match: str = "."
    times: int = 1
    spare: int = 0
    code: str = ""
    at: int = 0
    seconds: float = 0.0


@dataclass
class Faults:
    """The proxy, on a port of its own."""

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            faults = outer

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that goes away is what these tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, *faults: Fault) -> None:
        with self.lock:
            self.faults.extend(faults)

    def seen(self, match: str) -> int:
        """How many requests of a kind have come."""
        return sum(bool(re.search(match, request)) for request in self.requests)

    def take(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    if fault.spare > 0:
                        fault.spare -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> Faults:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    faults: Faults
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.faults.take(f"{self.command} {self.path}")
        kind = fault.kind if fault else ""
        body = self._body()
        if fault and kind == "refuse":
            self._drop()
            return
        if fault and kind.isdigit():
            self._answer(int(kind), fault.code)
            return
        if fault and kind == "delay":
            time.sleep(fault.seconds)
        try:
            self._pass_on(body, fault)
        except (ConnectionError, http.client.HTTPException, TimeoutError):
            self._drop()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_GET

    def _body(self) -> bytes | None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            whole = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        length = self.headers.get("Content-Length")
        return None if length is None else self.rfile.read(int(length))

    def _answer(self, status: int, code: str) -> None:
        text = S3_ERROR.format(code=code).encode() if code else b'{"error_code": "", "message": "out of order"}'
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if code else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _pass_on(self, body: bytes | None, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.faults.upstream, timeout=120)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", "transfer-encoding"):
                    upstream.putheader(name, value)
            if body is not None and "Content-Length" not in self.headers:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            if fault and fault.kind == "lose":
                answer.read()
                self._drop()
                return
            self._return(answer, fault)

    def _return(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        self.send_response(answer.status)
        length = answer.getheader("Content-Length")
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        whole = None if length is not None else answer.read()
        if whole is not None:
            self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        while data := (whole if whole is not None and not sent else answer.read(65_536)):
            if fault and fault.kind in ("cut", "stall") and sent + len(data) > fault.at:
                self.wfile.write(data[: fault.at - sent])
                self.wfile.flush()
                time.sleep(fault.seconds)
                self._drop()
                return
            if fault and fault.kind == "damage" and sent == 0:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.wfile.write(data)
            sent += len(data)

    def _drop(self) -> None:
        """Close the connection at once, as a server that dies."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
