"""What a store's failure means: worth another try, or final, and then one line that says what to do."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from dino_dist.errors import UserError

_FINAL_STATUS = {
    401: "the store wants credentials; give them where fsspec looks (environment, $FSSPEC_CONFIG_DIR)",
    403: "the store refuses this user; check the credentials and the permission to read",
    404: "there is no such object; check the path",
    407: "the proxy wants credentials",
    410: "there is no such object any more; check the path",
    416: "the object ends before this range: it changed since it was indexed; index it again",
}
_ASK_LATER = frozenset({408, 425, 429})
_FINAL_ERRNOS = {
    errno.EINVAL: "the store calls this request invalid; check the path, the endpoint and the region",
    errno.EPERM: "the store does not permit this",
    errno.ENOSYS: "the store does not know this request",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EREMCHG: "the bucket lies elsewhere; check the endpoint and the region",
}
# Families by name, so that no client library is imported to ask.
_CLIENT_ERRORS = frozenset({"ClientError", "ResponseParserError", "HTTPException", "ChecksumError"})
_CREDENTIALS = "check credentials, region and endpoint where fsspec and its clients look (environment, configuration)"
_FLEETING_BOTO_ERRORS = frozenset({"HTTPClientError", "ConnectionError", "IncompleteReadError"})
_CERTIFICATE_ERRORS = frozenset({"SSLCertVerificationError", "ClientConnectorCertificateError"})
_UNTRUSTED = "its certificate cannot be verified; check the URL and the certificates of this system"
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")


class TryAgain(Exception):
    """A failure that may pass; the message is the reason."""


class WrongBytesError(TryAgain):
    """Bytes of the right number that are not those that were indexed."""


class StatusError(Exception):
    """An HTTP status that is no success."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} ({reason})" if reason else f"HTTP {status}")
        self.status = status


def final_reason(error: Exception) -> str | None:
    """Why another try is of no use, and what to do; None if one is. Raises `error` itself if no store gave it."""
    if isinstance(error, TryAgain | TimeoutError | EOFError):
        return None
    if isinstance(error, StatusError):
        return _of_status(error.status)
    families = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError):
        return _of_system(error, families)
    if families & {"BotoCoreError", "GoogleAuthError"}:
        return None if families & _FLEETING_BOTO_ERRORS else _CREDENTIALS
    if "HttpError" in families:  # of GCS, with the status in it
        code = getattr(error, "code", None)
        return _of_status(code) if isinstance(code, int) else None
    if isinstance(error, ValueError):
        return "check the URL"
    if families & _CLIENT_ERRORS:
        return None
    raise error


def user_error(url: str, error: Exception, what_to_do: str, *, may_pass: bool = False) -> UserError:
    """The one line of a failure that is final, for this start at least."""
    return UserError(redacted(f"{url}: {describe(error)}: {what_to_do}"), may_pass=may_pass)


def redacted(text: str) -> str:
    """The text without user names and passwords in its URLs: it may be shown, logged and kept."""
    return _USER_INFO.sub("***@", text)


def index_it_again(index_path: Path) -> str:
    """What to do about an object that is not the one that was indexed; its index lies at `index_path` here."""
    return (
        f"restore the object; or index it again (delete the manifest.json beside it, if there is one, and {index_path} "
        f"with its manifest.json) and start with a new run folder"
    )


def changed_error(url: str, *, now_bytes: int | None, indexed_bytes: int) -> UserError:
    """The one line of a shard that is not the one that was indexed."""
    now = "is gone (HTTP 404 or no such key)" if now_bytes is None else f"has {now_bytes} bytes"
    return UserError(
        f"{redacted(url)} {now} but had {indexed_bytes} bytes when it was indexed; restore it, or index it again and "
        f"start with a new run folder"
    )


def describe(error: Exception) -> str:
    """What happened, on one line."""
    text = redacted(" ".join(str(error).split()))[:200]
    if isinstance(error, TimeoutError) and not text:
        return "no answer in time"
    if isinstance(error, StatusError | TryAgain):
        return text
    status = _status_of(error)
    if status is not None and str(status) not in text:
        text = f"HTTP {status}: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _of_system(error: OSError, families: set[str]) -> str | None:
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return _FINAL_STATUS[404]
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return _FINAL_STATUS[403]
    if "SSLError" in families:  # its numbers are none of the system's
        return _UNTRUSTED if families & _CERTIFICATE_ERRORS else None
    return _FINAL_ERRNOS.get(error.errno or 0)


def _of_status(status: int) -> str | None:
    if status in _ASK_LATER or status >= 500:
        return None
    return _FINAL_STATUS.get(status, "the store refuses this request; check the URL")


def _status_of(error: Exception) -> int | None:
    """The HTTP status behind a translated error of an S3 client, if it kept it."""
    response = getattr(error.__cause__, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None
