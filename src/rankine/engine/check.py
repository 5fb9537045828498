"""What came out, measured on the written directory and not on what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine.anatomy import Target
from rankine.budget import Option
from rankine.checkpoint import load, open_streamed
from rankine.engine.run import Run
from rankine.errors import UserError
from rankine.patch import Patch, stored_bits
from rankine.structures.bank import full_shape
from rankine.tasks import FunctionTask
from rankine.tasks.task import leaves


@dataclass(frozen=True)
class Size:
    """Stored bits of the targeted weights, and their number."""

    bits: int
    weights: int

    @property
    def keep(self) -> float:
        """Stored bits ÷ 16 per targeted weight."""
        return self.bits / (16 * self.weights)

    @property
    def per_weight(self) -> float:
        """Mean stored bits per targeted weight."""
        return self.bits / self.weights


def measured_size(model: nn.Module, targets: list[Target]) -> Size:
    """Counted on the tensors of the model that will be, or was, saved."""
    paths = [weight.path for target in targets for weight in target.weights]
    return Size(stored_bits(model, *paths), sum(target.size for target in targets))


def check_bits(model: nn.Module, patch: Patch, choices: Mapping[str, Option]) -> None:
    """Every structure stores exactly the bits it states, and together at most what was allotted.
    One that a later stage put others into (codes for a factor) is the sum of its parts."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for path, structure in patch.modules.items():
        found = stored_bits(model, path)
        if any(inner.startswith(path + ".") for inner in patch.modules):
            continue
        stated = structure.bits(full_shape(model.get_submodule(path)), dtype)
        if found != stated:
            raise AssertionError(
                f"{path}: {structure} states {stated} bits and stores {found}: please report this"
            )
    outer = [p for p in patch.modules if not any(p.startswith(o + ".") for o in patch.modules)]
    total, allotted = stored_bits(model, *outer), sum(option.bits for option in choices.values())
    if choices and total > allotted:
        raise AssertionError(f"{allotted} bits were allotted and {total} are stored")


def reopened(directory: Path, run: Run) -> nn.Module:
    """The written directory, loaded as a user will load it."""
    if run.streamed:
        opened = open_streamed(directory)
        assert opened is not None, "what is streamed is written under the model's own names"
        return opened[0].eval()
    device = next(run.model.parameters()).device
    return load(directory, into=run.skeleton).to(device).eval()


@torch.no_grad()
def check_outputs(model: nn.Module, run: Run) -> None:
    """Finite outputs on the first calibration batch, where there is one."""
    if isinstance(run.task, FunctionTask) and not run.task.has_data:
        return
    batch = run.calibration[0]
    outputs: Any = run.task.run(model, batch)
    found = leaves(getattr(outputs, "logits", outputs))
    if not all(bool(torch.isfinite(tensor).all()) for _, tensor in found):
        raise UserError(
            "expected finite outputs of the compressed model, found NaN or infinity: store it "
            "with --dtype bfloat16 or float32, or keep more"
        )
