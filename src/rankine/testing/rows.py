"""A row of the table that specifies methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A method, its knobs, and the budget it is run at (None: the knobs fix the size)."""

    method: str
    keep: float | None = 0.6
    knobs: dict[str, Any] = field(default_factory=dict)
    #: The budget is shared by probing the model: on an untrained one, smaller may cost nothing.
    probes: bool = False
    #: One level for all targets: what is then left of the budget stays unused.
    coarse: bool = False

    @property
    def id(self) -> str:
        """What pytest shows."""
        knobs = ",".join(f"{k}={v}" for k, v in self.knobs.items())
        return "-".join(part for part in (self.method, str(self.keep), knobs) if part)

    @property
    def asked(self) -> dict[str, Any]:
        """Keywords of `rankine.compress`."""
        size = {} if self.keep is None else {"keep": self.keep}
        return {"method": self.method, "set": self.knobs, **size}
