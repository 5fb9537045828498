"""What the statistics tests share: a survey with a spool in memory, and plain references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tiny_models as tiny
from rankine.anatomy import describe
from rankine.statistics import InputMoment, Moment, OutputGradient, Walk, survey
from rankine.statistics.moments import Need

INPUTS, GRADIENTS = InputMoment(), OutputGradient()


MODELS = {**tiny.LANGUAGE, "bert": tiny.bert, "mlp": tiny.mlp}


def built(name: str) -> tuple[nn.Module, Any]:
    """A float64 model (so that only the method's own rounding is left) and its task."""
    model = MODELS[name]().double()
    if name == "mlp":
        return model, tiny.regression(dtype=torch.float64)
    return model, tiny.classified() if name == "bert" else tiny.tokens(padded=True)


class Spool(dict):
    """The journal's part in a survey, in memory; counts what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def keep(self, unit: str, tensors: Any) -> None:
        self.written.append(unit)
        self[unit] = {name: tensor.clone() for name, tensor in tensors.items()}


def surveyed(
    model: nn.Module, task: Any, *needs: Need, spool: Spool | None = None, **kw: Any
) -> Any:
    """(statistics, anatomy) of all weights inside the blocks."""
    anatomy, spool = describe(model), spool if spool is not None else Spool()
    model.requires_grad_(False)
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    wanted = {w.path: frozenset(needs or {INPUTS}) for w in anatomy.linears}
    return survey(walk, wanted, spool.get, spool.keep, **kw), anatomy


def plain_inputs(model: nn.Module, task: Any, paths: list[str]) -> dict[str, Moment]:
    """Moments by a hook on each module while the whole model runs."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    for batch in task.batches("calibration"):
        mask = task.mask(batch)

        def hook(path: str, mask: Tensor | None = mask) -> Any:
            return lambda module, args: seen[path].append(kept(args[0].detach(), mask))

        handles = [model.get_submodule(p).register_forward_pre_hook(hook(p)) for p in paths]
        with torch.no_grad():
            task.run(model, batch)
        for handle in handles:
            handle.remove()
    return {path: moment(torch.cat(rows)) for path, rows in seen.items()}


def plain_gradients(model: nn.Module, task: Any, paths: list[str]) -> dict[str, Tensor]:
    """(positions, o) gradients of the summed loss terms at each module's output, by autograd
    through the whole model."""
    rows: dict[str, list[Tensor]] = {path: [] for path in paths}
    model.requires_grad_(True)
    for batch in task.batches("calibration"):
        outputs: dict[str, Tensor] = {}

        def hook(path: str, outputs: dict[str, Tensor] = outputs) -> Any:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                output.retain_grad()
                outputs[path] = output

            return keep

        handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
        loss = task.loss(task.run(model, batch), batch)
        (loss * task.terms(batch)).sum().backward()
        for handle in handles:
            handle.remove()
        for path in paths:
            rows[path].append(kept(outputs[path].grad, task.mask(batch)))
    model.requires_grad_(False)
    model.zero_grad()
    return {path: torch.cat(found) for path, found in rows.items()}


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """(positions, n) rows that are no padding."""
    flat = x.reshape(-1, x.shape[-1]).double()
    return flat if mask is None else flat[mask.reshape(-1)]


def moment(rows: Tensor) -> Moment:
    """Second moment and mean of rows."""
    return Moment(rows.T @ rows / len(rows), rows.mean(0), len(rows))


def close(a: Tensor, b: Tensor, relative: float = 1e-10) -> bool:
    """Equal up to a fraction of the largest entry."""
    return float((a - b).abs().max()) <= relative * float(b.abs().max())
