"""Ranged reads from HTTP(S), S3 and GCS by fsspec: exact lengths, bounded time, retries for what may pass.

Nothing is cached or read ahead here. Credentials, endpoints and proxies are whatever fsspec and its clients find in
their own configuration. One object belongs to one process and serves all its threads: fsspec does the talking on a
thread of its own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dino_dist.data.stores.store_errors import (
    StatusError,
    TryAgain,
    WrongBytesError,
    describe,
    final_reason,
    redacted,
    user_error,
)
from dino_dist.data.stores.store_options import StoreOptions, Tally
from dino_dist.errors import UserError

T = TypeVar("T")

_CLIENT_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
}
_EXTRAS = {"aiohttp": "remote", "s3fs": "remote", "gcsfs": "gcs"}
_HTTP = ("http", "https")
_FIRST_PAUSE_S = 0.1
_LONGER = 3.0
"""Each pause than the one before: a store that refuses connections for most of a minute is waited for."""
_PARTIAL_CONTENT = 206
_S3_CONNECTIONS = 32


class StoreClosed(Exception):
    """The store was closed while a thread was waiting to ask again."""


class RemoteStore:
    """Reads objects by URL."""

    def __init__(self, options: StoreOptions, tally: Tally) -> None:
        self._options = options
        self._tally = tally
        self._systems: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._random = random.Random()

    def read(
        self, url: str, offset: int, size: int, is_right: Callable[[bytes], bool] | None = None, *, if_wrong: str = ""
    ) -> bytes:
        """Exactly `size` bytes at `offset`, in one request; asked for again while `is_right` denies them.

        `if_wrong` is what to do if it denies them to the end.

        `UserError` if the store refuses, or has failed as often as allowed.
        """
        if size == 0:
            return b""

        def request() -> bytes:
            data = self._range(url, offset, offset + size)
            self._tally.add(requests=1, bytes_received=len(data))
            if len(data) != size:
                raise TryAgain(f"{len(data)} of {size} bytes came")
            if is_right is not None and not is_right(data):
                raise WrongBytesError("wrong bytes (checksum); the object may have changed since it was indexed")
            return data

        return self._persist(url, request, if_wrong)

    def read_file(self, url: str, *, max_bytes: int) -> bytes | None:
        """A whole small object; None if there is none. `UserError` as for `read`, or if it is larger.

        Stores that keep their listing private answer 403 for what is not there: that passes for absence here.
        """
        size = self.size_bytes(url, refused_is_absent=True)
        if size is None:
            return None
        if size > max_bytes:
            raise UserError(f"{redacted(url)} has {size} bytes; at most {max_bytes} are read")
        return self.read(url, 0, size)

    def size_bytes(self, url: str, *, refused_is_absent: bool = False) -> int | None:
        """Of the object; None if there is none. `UserError` as for `read`."""
        ask = self._http_size if _protocol(url) in _HTTP else self._object_size

        def request() -> int | None:
            try:
                return ask(url)
            except (FileNotFoundError, PermissionError, StatusError) as error:
                missing = isinstance(error, FileNotFoundError) or getattr(error, "status", 0) in (404, 410)
                refused = isinstance(error, PermissionError) or getattr(error, "status", 0) == 403
                if missing or (refused and refused_is_absent):
                    return None
                raise

        return self._persist(url, request)

    def list_folder(self, url: str) -> list[str]:
        """URLs of the objects right below a folder (or bucket) of an object store, sorted; `UserError` for HTTP."""
        protocol = _protocol(url)
        if protocol in _HTTP:
            raise UserError(
                f"{redacted(url)}: a web server cannot be listed; give {{000..099}}.tar or the URL of a manifest.json"
            )
        system = self._system(protocol)

        def request() -> list[str]:
            entries = system.ls(url, detail=True, refresh=True, timeout=self._options.timeout_s)
            return sorted(f"{protocol}://{entry['name']}" for entry in entries if entry["type"] == "file")

        return self._persist(url, request)

    def close(self) -> None:
        """End the waits of other threads; an object that was closed is of no more use."""
        self._closed.set()
        with self._lock:
            self._systems.clear()  # their sessions end with them

    def _persist(self, url: str, request: Callable[[], T], if_wrong: str = "") -> T:
        """The answer to a request that is made up to `max_attempts` times."""
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, self._options.max_attempts + 1):
            if self._closed.is_set():
                raise StoreClosed(redacted(url))
            began_s = time.monotonic()
            try:
                return request()
            except Exception as error:
                reason = final_reason(error)  # raises what is no failure of a store
                if reason is not None:
                    raise user_error(url, error, reason) from error
                if attempt == self._options.max_attempts:
                    changed = isinstance(error, WrongBytesError) and bool(if_wrong)
                    advice = if_wrong if changed else "see to the store or the network, then start again"
                    raise user_error(url, error, f"tried {attempt} times; {advice}", may_pass=not changed) from error
            self._tally.add(retries=1)
            # Within the time of this attempt: all of them take `max_attempts * timeout_s` at most, however they fail.
            left_s = self._options.timeout_s - (time.monotonic() - began_s)
            # Jitter, since all ranks of a job meet the same trouble at the same time.
            self._closed.wait(max(0.0, min(pause_s, left_s)) * self._random.uniform(0.5, 1.0))
            pause_s *= _LONGER
        raise AssertionError("max_attempts is at least 1")

    def _range(self, url: str, start: int, stop: int) -> bytes:
        protocol = _protocol(url)
        system = self._system(protocol)
        if protocol in _HTTP:
            part: bytes = self._sync(system.loop, self._http_range, system, url, start, stop)[0]
            return part
        data: bytes = system.cat_file(url, start=start, end=stop, timeout=self._options.timeout_s)
        return data

    async def _http_range(self, system: Any, url: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes start..stop-1 and the size of the whole, if the server says so: anything else is no answer.

        The status is looked at before the body: a server that ignores the range sends all of a large file.
        """
        from aiohttp import ClientTimeout

        # Its own time-out would be five minutes, and one that only the caller keeps would leave the request running.
        options = {**system.kwargs, "timeout": ClientTimeout(total=self._options.timeout_s)}
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session = await system.set_session()
        async with session.get(system.encode_url(url), headers=headers, **options) as response:
            if response.status >= 300:
                raise StatusError(response.status, response.reason or "")
            if response.status != _PARTIAL_CONTENT:
                raise TryAgain(f"HTTP {response.status}: the server ignores byte ranges, which shards are read by")
            encoding = response.headers.get("Content-Encoding", "identity")
            unit, _, place = response.headers.get("Content-Range", "").partition(" ")
            span, _, total = place.partition("/")
            if total.isdecimal() and int(total) < stop:
                raise StatusError(416, f"the object has {total} bytes")
            if unit != "bytes" or span != f"{start}-{stop - 1}" or not total.isdecimal() or encoding != "identity":
                got = f"{unit} {place}"[:60]
                raise TryAgain(f"asked for bytes {start}-{stop - 1}, the server answers {got!r} ({encoding})")
            body = bytearray()
            while chunk := await response.content.read(stop - start + 1 - len(body)):  # one more shows that more came
                body += chunk
            return bytes(body), int(total)

    def _http_size(self, url: str) -> int:
        system = self._system(_protocol(url))
        try:
            total: int = self._sync(system.loop, self._http_range, system, url, 0, 1)[1]
        except StatusError as error:
            if error.status == 416:  # only an empty object has no first byte
                return 0
            raise
        return total

    def _object_size(self, url: str) -> int:
        info = self._system(_protocol(url)).info(url, refresh=True, timeout=self._options.timeout_s)
        if info["type"] != "file":
            raise FileNotFoundError(url)
        return int(info["size"])

    def _sync(self, loop: Any, coroutine: Callable[..., Any], *args: Any) -> Any:
        from fsspec.asyn import sync

        return sync(loop, coroutine, *args, timeout=self._options.timeout_s)

    def _system(self, protocol: str) -> Any:
        if protocol not in _CLIENT_PACKAGES:
            raise UserError(f"{protocol}:// is no store that shards are read from; use http(s)://, s3:// or gs://")
        with self._lock:
            if self._closed.is_set():
                raise StoreClosed(protocol)
            if protocol not in self._systems:
                self._systems[protocol] = _open_system(protocol)
            return self._systems[protocol]


def _open_system(protocol: str) -> Any:
    """A client of this process's own."""
    try:
        import fsspec

        if _CLIENT_PACKAGES[protocol] != "s3fs":
            return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
        # Its own two layers of retries would spend the time of one of ours; what the user configured wins.
        config = {"retries": {"max_attempts": 0}, "max_pool_connections": _S3_CONNECTIONS}
        for name in ("s3", "s3a"):
            config |= fsspec.config.conf.get(name, {}).get("config_kwargs", {})
        system = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        system.retries = 1
        return system
    except ImportError as error:
        package = _CLIENT_PACKAGES[protocol]
        command = f"pip install 'dino-dist[{_EXTRAS[package]}]'"
        raise UserError(f"{protocol}:// needs the package {package} ({describe(error)}): {command}") from error


def _protocol(url: str) -> str:
    return url.partition("://")[0]
