"""Real stores on loopback: a web server that knows ranges and fails on purpose, alone or in front of an S3 server."""

from __future__ import annotations

import gc
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

Plan = Callable[[str, int], str]
"""The fault for the n-th request (from 0) of a path and range; empty: none."""


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder, or forwards to another server, and spoils the answers to ranged requests by plan."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, root: Path | str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.plan: Plan = lambda place, number: ""
        self.asked: Counter[str] = Counter()
        """Ranged requests, by `PATH RANGE`."""
        self.injected: Counter[str] = Counter()
        """Faults by kind."""
        self.stop_stalling = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, path: str, byte_range: str) -> str:
        with self._lock:
            place = f"{path} {byte_range}"
            number = self.asked[place]
            self.asked[place] += 1
            fault = self.plan(place, number)
            if fault:
                self.injected[fault] += 1
            return fault

    def requests_of(self, path: str) -> int:
        return sum(count for place, count in self.asked.items() if place.split(" ")[0] == path)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are part of the plan."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_GET(self) -> None:
        self._answer(*(self._forwarded() if isinstance(self.server.root, str) else self._from_folder()))

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _from_folder(self) -> tuple[int, dict[str, str], bytes, bytes]:
        """Status, headers, the body asked for and the whole."""
        assert isinstance(self.server.root, Path)
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            return 404, {}, b"", b""
        whole = path.read_bytes()
        asked = self.headers.get("Range")
        if asked is None:
            return 200, {}, whole, whole
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        if first >= len(whole):
            return 416, {"Content-Range": f"bytes */{len(whole)}"}, b"", whole
        body = whole[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(whole)}"}, body, whole

    def _forwarded(self) -> tuple[int, dict[str, str], bytes, bytes]:
        there = urlsplit(str(self.server.root))
        connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers))
        response = connection.getresponse()
        body = response.read()
        left_out = {"content-length", "connection", "transfer-encoding", "date", "server"}
        headers = {key: value for key, value in response.getheaders() if key.lower() not in left_out}
        if self.command == "HEAD":
            headers["Content-Length"] = response.headers["Content-Length"] or "0"
        connection.close()
        return response.status, headers, body, body * 2

    def _answer(self, status: int, headers: dict[str, str], body: bytes, whole: bytes) -> None:
        asked = self.headers.get("Range")
        fault = self.server.fault_of(self.path, asked) if asked else ""
        if fault.isdecimal():
            status, headers, body = int(fault), {"Content-Type": "text/plain"}, b"this is not the body you look for"
        elif fault in ("whole", "endless"):
            status, headers, body = (200, {}, whole) if fault == "whole" else (status, headers, whole)
        elif fault == "wrong" and body:
            half = len(body) // 2
            body = body[:half] + body[half:].translate(bytes(byte ^ 0xFF for byte in range(256)))
        elif fault == "elsewhere":
            headers = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(whole)}"}
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault not in ("reset", "cut", "stall"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.server.stop_stalling.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _seeded_plan(seed: int, kinds: Sequence[str], most: int) -> Plan:
    """0..most faults for the first requests of each place, whatever the order in which places are asked for."""

    def plan(place: str, number: int) -> str:
        rng = random.Random(f"{seed} {place}")
        faults = rng.choices(kinds, k=rng.randint(0, most))
        return faults[number] if number < len(faults) else ""

    return plan


@pytest.fixture(autouse=True, scope="module")
def no_stores_left() -> Iterator[None]:
    """fsspec's file systems are cycles: a forked child of a later test would wait a second for each it collects."""
    yield
    gc.collect()


@pytest.fixture
def seeded_plan() -> Callable[[int, Sequence[str], int], Plan]:
    """See `_seeded_plan`."""
    return _seeded_plan


@pytest.fixture
def serve() -> Iterator[Callable[[Path | str], FaultyServer]]:
    """`serve(folder or URL of another server)` starts a `FaultyServer`."""
    servers: list[FaultyServer] = []

    def start(root: Path | str) -> FaultyServer:
        server = FaultyServer(root)
        server.thread.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop_stalling.set()
        server.shutdown()
        server.server_close()
