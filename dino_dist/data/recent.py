"""A bounded memory of the values used last: mapped indexes, permutations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps the `capacity` values used last, and makes the others again when asked for.

    A copy that travels to another process starts empty. Not for use by several threads at once.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made by `make` if it is not held."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        while len(self._values) >= self._capacity:
            self._values.popitem(last=False)
        self._values[key] = value
        return value

    def __len__(self) -> int:
        return len(self._values)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_values": OrderedDict()}
