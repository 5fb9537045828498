"""The way back: gradients block by block from the loss, each block recomputed once with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.statistics.banks import BankGradientSum, routed, routed_gradients
from rankine.statistics.boundaries import Boundaries
from rankine.statistics.fisher import FisherSum
from rankine.statistics.moments import OutputGradient, clip_rows, middle_positions
from rankine.statistics.sums import finite
from rankine.statistics.units import OUTSIDE, Unit
from rankine.statistics.walk import Walk, listening
from rankine.structures.bank import Routing

Progress = Callable[[int, int], None]
Keep = Callable[[str, Mapping[str, Tensor]], None]


def reverse(
    walk: Walk,
    units: list[Unit],
    wanted: list[Unit],
    boundaries: Boundaries,
    keep: Keep,
    report: Progress,
) -> None:
    """From the loss back to the first unit that is wanted, each one recomputed with gradients."""
    if walk.whole:
        for unit in wanted:
            _from_loss(walk, unit, True, keep)
        report(2 * len(units), 2 * len(units))
        return
    loss_unit = units[-1] if units[-1].index == OUTSIDE else Unit(OUTSIDE, walk.tail)
    grads, terms = _from_loss(walk, loss_unit, loss_unit in wanted, keep)
    first = min(units.index(u) for u in wanted)
    done = len(units)
    for n in reversed(range(len(units))):
        hidden_of = boundaries.pop()
        if units[n] is not loss_unit and n >= first:
            unit = units[n] if units[n] in wanted else Unit(0, units[n].run)
            sums = _Gradients(walk, unit, terms)
            with walk.standing(units[n].path):
                for index, hidden in enumerate(hidden_of):
                    grads[index] = sums.add(index, hidden, units[n].run, grads[index])
            if units[n] in wanted:
                keep(f"grad-{units[n].index}", sums.found())
        done += 1
        report(done, 2 * len(units))


def _from_loss(
    walk: Walk, unit: Unit, measured: bool, keep: Keep
) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients at the last boundary, each example's number of loss terms), both by batch; keeps
    what the unit itself is measured for."""
    terms: list[Tensor] = []
    sums = _Gradients(walk, unit if measured else Unit(OUTSIDE, unit.run), terms)

    def run(index: int, hidden: Tensor) -> Tensor:
        total, terms_n = walk.loss(index, unit.run(index, hidden))
        terms.append(terms_n.detach())
        return total

    grads = [sums.add(index, hidden, run, None) for index, hidden in enumerate(walk.hidden)]
    if measured:
        keep(f"grad-{unit.index}", sums.found())
    return grads, terms


class _Gradients:
    """Sums over the batches of what one unit's gradients are measured for. `terms`: by batch, each
    example's number of loss terms; filled while the loss itself is run."""

    def __init__(self, walk: Walk, unit: Unit, terms: Sequence[Tensor]):
        self.walk, self.unit, self.terms = walk, unit, terms
        self.sums = {key: make() for key, (_, _, make) in unit.writes.items()}
        self.positions = dict.fromkeys(unit.writes, 0)
        self.fishers = {path: FisherSum() for path in unit.weights.values()}
        #: Gradient moments weigh an error: in the spool they are as precise as the gradients were.
        self.precision = torch.float32
        self.paths = sorted({path for path, _, _ in unit.writes.values()} | set(self.fishers))

    def add(
        self, index: int, hidden: Tensor, run: Callable[[int, Tensor], Any], seed: Tensor | None
    ) -> Tensor:
        """Add one batch; return the gradient at the unit's input."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        routings: dict[str, Routing] = {}

        def listen(path: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                if path in self.fishers:
                    inputs[path] = args[0].detach()
                if len(args) > 1 and isinstance(args[1], Routing):
                    routings[path] = args[1]
                outputs[path] = output if output.requires_grad else output.requires_grad_()
                return outputs[path]

            return hook

        modules = [(self.walk.model.get_submodule(p), listen(p), False) for p in self.paths]
        with torch.enable_grad(), listening(modules):
            leaf = hidden.detach().requires_grad_()
            out = run(index, leaf)
            reached = [path for path in self.paths if path in outputs]
            asked = [leaf, *(outputs[path] for path in reached)]
            results = torch.autograd.grad(out, asked, seed, allow_unused=True)
        by_path = dict(zip(reached, results[1:], strict=True))
        for key, (path, need, _) in self.unit.writes.items():
            if (g := by_path.get(path)) is None:
                continue
            self.precision = torch.promote_types(self.precision, g.dtype)
            total = self.sums[key]
            if isinstance(total, BankGradientSum):
                mask = self.mask(index, hidden)
                total.add(routed_gradients(g, routings[path], mask, need))
                self.positions[key] += sum(map(len, routed(g, routings[path], mask)))
            else:
                total.add(self.rows(index, g, need))
                self.positions[key] += self.walk.rows(index, g).shape[0]
        for path, fisher in self.fishers.items():
            if (g := by_path.get(path)) is not None:
                x_bti, g_bto = (self.examples(index, t, hidden, path) for t in (inputs[path], g))
                fisher.add(x_bti, g_bto, self.terms[index])
        return results[0] if results[0] is not None else torch.zeros_like(leaf)

    def mask(self, index: int, hidden: Tensor) -> Tensor | None:
        """(examples, positions) that count, where that is known."""
        mask = self.walk.masks[index]
        if mask is None and hidden.dim() == 3:
            return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        return mask

    def rows(self, index: int, g: Tensor, need: OutputGradient) -> Tensor:
        """(positions, o) rows of a gradient after the need's clipping and choice of positions."""
        mask = self.walk.masks[index]
        if mask is None and g.dim() == 3:
            mask = torch.ones(g.shape[:-1], dtype=torch.bool, device=g.device)
        if mask is None or mask.dim() != 2 or g[..., 0].numel() != mask.numel():
            return self.walk.rows(index, g)  # no positions to clip or to choose among
        g_btn = g.reshape(*mask.shape, g.shape[-1])
        return clip_rows(g_btn, mask, need.clip)[middle_positions(mask, need.middle)]

    def examples(self, index: int, x: Tensor, hidden: Tensor, path: str) -> Tensor:
        """(examples, positions, n) of an activation: padding included, whose gradient is the
        example's own (none, where nothing attends to it)."""
        count, mask = len(self.terms[index]), self.walk.masks[index]
        if x.dim() > 1 and x.shape[0] == count:
            return x.reshape(count, -1, x.shape[-1])
        lead = tuple(hidden.shape[:-1] if mask is None else mask.shape)
        if x.dim() == 2 and lead[:1] == (count,) and x.shape[0] == math.prod(lead):
            return x.reshape(*lead, x.shape[-1])  # OPT flattens batch and time
        raise UserError(
            f"expected activations in which {count} examples can be told apart, found the shape "
            f"{tuple(x.shape)} at {path}: exclude this layer or choose another method"
        )

    def found(self) -> dict[str, Tensor]:
        """Moments are means over positions, times positions per term; Fisher sums are means over
        examples."""
        group = self.walk.group
        terms = group.total(sum(float(terms_n.sum()) for terms_n in self.terms))
        found: dict[str, Tensor] = {}
        for key, total in self.sums.items():
            moment = finite(total, self.unit.writes[key][0], "gradients", group)
            moment.scale(group.total(self.positions[key]) / max(terms, 1.0))
            tensors = moment.tensors(self.precision)
            found.update({f"{key}/{name}": tensor for name, tensor in tensors.items()})
        for key, path in self.unit.weights.items():
            tensors = finite(self.fishers[path], path, "gradients", group).tensors()
            found.update({f"{key}/{name}": tensor for name, tensor in tensors.items()})
        return found
