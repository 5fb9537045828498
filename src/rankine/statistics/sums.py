"""How a running sum ends: in finite numbers, or in a sentence."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rankine.errors import UserError
from rankine.ranks import Group


class Measured(Protocol):
    """What a sum ends in."""

    def tensors(self) -> dict[str, Tensor]: ...


S = TypeVar("S", bound=Measured, covariant=True)


class Running(Protocol[S]):
    """A sum."""

    count: int

    def over(self, group: Group) -> None: ...

    def mean(self) -> S: ...


def finite(total: Running[S], path: str, what: str, group: Group) -> S:
    """The mean over all ranks; raises UserError where nothing was measured, or not numbers."""
    total.over(group)
    if total.count == 0:
        raise UserError(
            f"expected calibration data to reach {path}, found none: "
            "exclude this layer or calibrate on data that uses it"
        )
    found = total.mean()
    if not all(bool(torch.isfinite(t).all()) for t in found.tensors().values()):
        raise UserError(
            f"expected finite {what}, found NaN or infinity at {path}: "
            "check the model in this dtype, or load it with --dtype float32"
        )
    return found
