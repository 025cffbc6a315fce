"""What a URL may name, and what is said when it cannot be used; no server is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dino_dist.data.shards.index import open_dataset
from dino_dist.errors import UserError


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ftp://host/{0..9}.tar", r"ftp:// is no store .* use http\(s\)://, s3:// or gs://"),
        ("file:///data/0.tar", "file:// is no store"),
        ("https://host/*.tar", "a URL takes braces"),
        ("https://host/0.tar?token=1", "a URL takes braces"),
        ("https://host/{0..999999999}.tar", "more than 1000000 shards"),
        ("https://host/{0..", "unreadable braces"),
        ("https://host/{0,0}.tar", "names https://host/0.tar twice"),
        ("pipe:curl https://host/0.tar", "output of a command"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(spec, fallback_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "package"), [("gs", "gcsfs"), ("gcs", "gcsfs")])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        UserError, match=rf"^{protocol}:// needs the package {package} .*: pip install 'dino-dist\[gcs\]'$"
    ):
        open_dataset(f"{protocol}://bucket/0.tar", fallback_dir=tmp_path)
