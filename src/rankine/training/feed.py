"""Training batches without end, whose position a resumed run finds again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rankine.errors import UserError
from rankine.tasks import Task
from rankine.tasks.task import leaves


@dataclass
class Feed:
    """A task's training batches without end. `read` counts them and `digest` covers their bytes,
    so that a resumed run knows its data again."""

    task: Task
    read: int = 0
    digest: str = ""
    _batches: Iterator[Any] = field(default_factory=lambda: iter(()))

    def __next__(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.task.batches("train"))
            batch = next(self._batches, None)
        if batch is None:
            raise UserError("expected training data, found none: give more text, or another file")
        found = hashlib.sha256(self.digest.encode())
        for name, tensor in leaves(batch):
            found.update(f"{name}{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)  # a number has no bytes to view
            found.update(flat.view(torch.uint8).numpy().data)
        self.read, self.digest = self.read + 1, found.hexdigest()
        return batch

    def skip_to(self, read: int, digest: str) -> None:
        """Read on to where an interrupted run was; raises UserError when the data changed."""
        while self.read < read:
            next(self)
        if self.digest != digest:
            raise UserError(
                "expected to go on with the training data of the interrupted run, found other "
                "data: restore it, or start over with --fresh"
            )
