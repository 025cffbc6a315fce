"""Which failures of a store are worth another try."""

from __future__ import annotations

import errno
import ssl

import pytest

from dino_dist.data.stores.store_errors import StatusError, TryAgain, describe, final_reason, user_error


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_status_worth_another_try(status: int) -> None:
    assert final_reason(StatusError(status, "")) is None


@pytest.mark.parametrize("status", [300, 304, 400, 401, 403, 404, 405, 407, 410, 416, 451])
def test_final_status(status: int) -> None:
    assert final_reason(StatusError(status, "Reason"))


@pytest.mark.parametrize(
    "error",
    [
        TryAgain("3 of 5 bytes came"),
        TimeoutError(),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EIO, "trouble"),
        OSError(errno.EBUSY, "slow down"),
        OSError("an error without a number"),
        ssl.SSLError(1, "bad record"),  # 1 is no errno here
        EOFError(),
    ],
)
def test_trouble_that_may_pass(error: Exception) -> None:
    assert final_reason(error) is None


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("key"),
        PermissionError("denied"),
        OSError("Forbidden: b/k"),
        OSError(errno.EINVAL, "bad request"),
        ssl.SSLCertVerificationError(1, "self-signed"),
        ValueError("no URL"),
    ],
)
def test_trouble_that_stays(error: Exception) -> None:
    reason = final_reason(error)
    assert reason
    line = str(user_error("s3://b/k", error, reason))
    assert line.startswith("s3://b/k: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "is_final"),
    [
        ("NoCredentialsError", True),
        ("ParamValidationError", True),
        ("EndpointConnectionError", False),
        ("ReadTimeoutError", False),
        ("ConnectionClosedError", False),
        ("IncompleteReadError", False),
        ("HTTPClientError", False),
    ],
)
def test_errors_of_the_s3_client(name: str, is_final: bool) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    fields = {"endpoint_url": "u", "error": "e", "report": "r", "actual_bytes": 1, "expected_bytes": 2}
    assert bool(final_reason(getattr(exceptions, name)(**fields))) == is_final


def test_errors_of_the_web_client() -> None:
    aiohttp = pytest.importorskip("aiohttp")
    assert final_reason(aiohttp.ServerDisconnectedError()) is None
    assert final_reason(aiohttp.ClientPayloadError("cut")) is None
    assert final_reason(aiohttp.InvalidURL("http:///")) is not None


def test_a_fault_of_the_program_is_raised_as_it_is() -> None:
    for error in (TypeError("x"), AttributeError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            final_reason(error)


def test_what_happened_fits_on_a_line() -> None:
    assert describe(TimeoutError()) == "no answer in time"
    assert describe(StatusError(503, "Slow Down")) == "HTTP 503 (Slow Down)"
    assert len(describe(OSError("a\nb" * 1000))) < 250
    assert "\n" not in describe(OSError("a\nb"))
