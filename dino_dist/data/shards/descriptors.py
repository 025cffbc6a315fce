"""How many files a part of the program may keep open."""

from __future__ import annotations

import resource

_SHARE = 4
"""Several kinds of files are kept open at once, and the rest of the process needs some."""


def share_of_descriptors(at_most: int) -> int:
    """This many, or a quarter of what the system allows this process if that is less; at least 1."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return at_most if allowed == resource.RLIM_INFINITY else max(1, min(at_most, allowed // _SHARE))
