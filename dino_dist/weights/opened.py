"""A source of networks, opened: which networks it holds is known, none of them is read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dino_dist.errors import UserError
from dino_dist.weights.network_weights import NetworkWeights

ROLES = ("teacher", "student")
ONLY = "only"
"""The network of a file that holds one and does not say which."""


@dataclass(frozen=True, kw_only=True)
class OpenedWeights:
    """What a path turned out to be."""

    source: str
    networks: tuple[str, ...]
    """`teacher` and `student`, one of these, or `only`."""
    read: Callable[[str], NetworkWeights]
    """One of `networks`, on the CPU; `UserError` if it is no network of this architecture."""

    def network(self, name: str) -> NetworkWeights:
        """The network of that name, or the one that has none; `UserError` if there is another one only."""
        if name not in ROLES:
            raise UserError(f"--network {name}: choose teacher or student")
        if self.networks == (ONLY,):
            return self.read(ONLY)
        if name not in self.networks:
            raise UserError(f"{self.source} holds the {self.networks[0]} only: add --network {self.networks[0]}")
        return self.read(name)
