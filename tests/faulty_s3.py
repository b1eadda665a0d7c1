"""A proxy between a client and a real S3 server that breaks a part of what passes, by a seeded schedule.

    with embedded_s3(folder) as server, faulty_s3(server, seed=1) as faulty:
        # put faulty.environment into os.environ, then use open_storage("s3://ssacl/...")
        ...
    assert faulty.injected["flip"] > 0

Only the bodies of objects are flipped: S3 gives no checksum of its listings. The same request is never broken more than `in_a_row` times
in a row, so that a client which tries a few times more must come through.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from ssacl.data.storage import EmbeddedS3

KINDS = ("error", "reset", "lost_reply", "truncate", "flip", "slow")
"""5xx without the server's knowledge; connection reset in the middle of a body; request done but its answer lost; body that ends early;
one bit changed; body that trickles, or an answer that does not come, until the client gives up."""
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}
_OUTAGES = (
    (503, b"<Error><Code>SlowDown</Code></Error>", "application/xml"),
    (500, b"<Error><Code>InternalError</Code></Error>", "application/xml"),
    (502, b"<html>Bad Gateway</html>", "text/html"),
)


class FaultyS3(ThreadingHTTPServer):
    """The running proxy."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: EmbeddedS3, seed: int, share: float, kinds: tuple[str, ...], in_a_row: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(server.endpoint_url).netloc
        self.environment: Mapping[str, str] = server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}
        self.injected: Counter[str] = Counter()
        """Faults so far, by kind."""
        self.num_requests = 0
        self.down = False
        """True: every connection is closed without an answer."""
        self.down_for = 0
        """As many of the next requests as this are closed without an answer."""
        self.refusal = ""
        """S3's code of a 403 that answers every request."""
        self.stopped = threading.Event()
        self._random, self._share, self._kinds, self._in_a_row = random.Random(seed), share, kinds, in_a_row
        self._broken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def draw(self, request: str, possible: set[str]) -> tuple[str, float]:
        """The fault for a request ("": none), and a number of 0..1 that says where it strikes."""
        with self._lock:
            self.num_requests += 1
            strikes, kind, place = self._random.random() < self._share, self._random.choice(self._kinds), self._random.random()
            if not strikes or kind not in possible or self._broken[request] >= self._in_a_row:
                self._broken[request] = 0
                return "", place
            self._broken[request] += 1
            self.injected[kind] += 1
            return kind, place

    def is_down_now(self) -> bool:
        """Whether `down_for` closes this request."""
        with self._lock:
            if self.down_for <= 0:
                return False
            self.down_for -= 1
            self.injected["down"] += 1
            return True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_object = "list-type=" not in self.path and self.command in ("GET", "PUT")
        possible = set(KINDS) if is_object else {"error", "reset", "lost_reply", "truncate"}
        kind, place = self.server.draw(f"{self.command} {self.path} {self.headers.get('Range', '')}", possible)
        if self.server.down or self.server.is_down_now():
            self._hang_up()
        elif self.server.refusal:
            self._answer(403, {"Content-Type": "application/xml"}, f"<Error><Code>{self.server.refusal}</Code></Error>".encode())
        elif kind in ("reset", "truncate") and self.command != "GET":
            self._break_off(content, place)
        elif kind == "error":
            status, body, content_type = _OUTAGES[int(place * len(_OUTAGES))]
            self._answer(status, {"Content-Type": content_type}, body)
        else:
            upwards, downwards = (kind, "") if self.command == "PUT" else ("", kind)
            status, headers, body = self._ask(_flipped(content, place) if upwards == "flip" else content)
            if kind == "lost_reply":
                self._hang_up()
            elif upwards == "slow":
                self.server.stopped.wait(30)
            elif downwards in ("reset", "truncate", "slow") and body:
                self._answer(status, headers, body[: int(place * len(body))], len(body), pause_s=0.05 * (downwards == "slow"))
                self._hang_up(abort=downwards != "truncate")
            else:
                self._answer(status, headers, _flipped(body, place) if downwards == "flip" else body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    @contextmanager
    def _sent(self, content: bytes) -> Iterator[http.client.HTTPConnection]:
        with closing(http.client.HTTPConnection(self.server.upstream, timeout=30)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(content)
            yield upstream

    def _break_off(self, content: bytes, place: float) -> None:
        """Let the server see only the first part of a request's body."""
        if content:
            with self._sent(content[: int(place * len(content))]):
                pass
        self._hang_up()

    def _ask(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        with self._sent(content) as upstream:
            reply = upstream.getresponse()
            headers = {name: value for name, value in reply.getheaders() if name.lower() not in _HOP_BY_HOP}
            return reply.status, headers, reply.read()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, size: int | None = None, pause_s: float = 0.0) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        step = 1 if pause_s else max(1, len(body))
        for start in range(0, len(body), step):
            if self.server.stopped.wait(pause_s):
                return
            self.wfile.write(body[start : start + step])

    def _hang_up(self, abort: bool = True) -> None:
        self.close_connection = True
        if abort:  # A reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: tests look at what clients log."""


def _flipped(content: bytes, place: float) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 1 << int(place * 1000) % 8
    return bytes(changed)


@contextmanager
def faulty_s3(
    server: EmbeddedS3, seed: int = 0, share: float = 0.25, kinds: tuple[str, ...] = KINDS, in_a_row: int = 3
) -> Iterator[FaultyS3]:
    """Stand between clients and `server` until the block ends.

    Parameters
    ----------
    share
        Of the requests that may be broken.
    kinds
        Some of `KINDS`.
    in_a_row
        How often the same request is broken before it passes.
    """
    proxy = FaultyS3(server, seed, share, kinds, in_a_row)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        proxy.shutdown()
        proxy.server_close()
