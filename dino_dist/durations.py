"""Lengths of training given in steps, epochs or images, resolved once into steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from dino_dist.errors import UserError

_PATTERN = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<scale>[kM]?)(?P<unit>ep|st|im|)", re.ASCII)
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6}


@dataclass(frozen=True)
class Duration:
    """A non-negative amount of training: `10ep` epochs, `5000st` or `5000` steps, `1.28Mim` images."""

    amount: float
    unit: Literal["ep", "st", "im"]

    @staticmethod
    def parse(text: str) -> Duration:
        """Read a duration; `UserError` if it is none."""
        match = _PATTERN.fullmatch(text.strip())
        amount = math.inf if match is None else float(match["number"]) * _SCALES[match["scale"]]
        if match is None or not math.isfinite(amount):
            raise UserError(
                f"{text!r} is not a duration: write steps as 5000st (or 5000), epochs as 10ep, images as 1.28Mim"
            )
        unit: Literal["ep", "st", "im"] = "st"
        if match["unit"] in ("ep", "im"):
            unit = "ep" if match["unit"] == "ep" else "im"
        return Duration(amount, unit)

    def steps(self, *, batch_size: int, dataset_size: int) -> int:
        """The number of steps that covers this duration, rounded up: a partial step is a step."""
        images = {"st": batch_size, "ep": dataset_size, "im": 1}[self.unit] * self.amount
        # A float product such as 0.1 * 30 may land a hair above the whole number it means.
        return math.ceil(round(images / batch_size, 9))
