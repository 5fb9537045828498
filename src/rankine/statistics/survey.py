"""The survey: one walk forwards over the blocks gathers every declared input statistic, one walk
backwards the gradients. Memory is one block, its statistics and one boundary: finished moments go
to the spool at once, and boundaries that do not fit in memory wait in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import Weight
from rankine.errors import UserError
from rankine.statistics.boundaries import Boundaries
from rankine.statistics.moments import (
    InputMoment,
    Moment,
    MomentSum,
    Need,
    OutputGradient,
    clip_rows,
    middle_positions,
)
from rankine.statistics.walk import Walk, listening

#: Called after each block of each walk with (done, total): a progress bar.
Progress = Callable[[int, int], None]
Store = Callable[[str], Mapping[str, Tensor] | None]
Keep = Callable[[str, Mapping[str, Tensor]], None]
#: Block index of the weights outside all blocks.
OUTSIDE = -1


class Statistics:
    """What the survey found, keyed by need and tensor. `load` brings a block's tensors back from
    the spool; only the block last asked for is held."""

    def __init__(self, load: Store):
        self._load = load
        self._held: dict[str, tuple[str, Mapping[str, Tensor]]] = {}

    def inputs(self, weight: Weight) -> Moment:
        """Moment of what the weight reads: (i, i) and (i,)."""
        return self._moment("in", weight.block, _input_key(weight))

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """Moment of the gradient at what the weight writes: (o, o)."""
        return self._moment("grad", weight.block, _gradient_key(weight, need))

    def _moment(self, kind: str, block: int, key: str) -> Moment:
        unit = f"{kind}-{block}"
        if self._held.get(kind, ("", {}))[0] != unit:
            self._held[kind] = (unit, self._load(unit) or {})
        tensors = self._held[kind][1]
        if f"{key}/h" not in tensors:
            raise KeyError(f"statistic {key} was not declared by `needs`")
        return Moment.from_tensors({n: tensors[f"{key}/{n}"] for n in ("h", "mean", "count")})


def _input_key(weight: Weight) -> str:
    return weight.reads


def _gradient_key(weight: Weight, need: OutputGradient) -> str:
    return f"{need.middle}/{need.clip}/{weight.path}"


@dataclass(frozen=True)
class Unit:
    """What is measured in one block (or, last, outside all of them), and how it is run.

    `reads`: key of the statistic → path of the module whose input it is; `writes`: key → path of
    the module whose output's gradient it is, and the need.
    """

    index: int
    run: Callable[[int, Tensor], Any]
    path: str = ""
    reads: Mapping[str, str] = field(default_factory=dict)
    writes: Mapping[str, tuple[str, OutputGradient]] = field(default_factory=dict)


def survey(
    walk: Walk,
    needs: Mapping[str, frozenset[Need]],
    load: Store,
    keep: Keep,
    progress: Progress | None = None,
) -> Statistics:
    """Gather `needs` (weight path → needs). `load` and `keep` are the spool: block statistics
    that are there already (a resumed run) are not measured again.

    Raises UserError naming the layer whose activations or gradients are missing or not finite.
    """
    units = _units(walk, needs)
    for_inputs = [u for u in units if u.reads and load(f"in-{u.index}") is None]
    for_gradients = [u for u in units if u.writes and load(f"grad-{u.index}") is None]
    backwards = any(u.writes for u in units)
    steps = len(units) * (2 if backwards else 1)
    report = progress or (lambda done, total: None)
    if for_inputs or for_gradients:
        with Boundaries() as boundaries:
            for n, unit in enumerate(units):
                if for_gradients:
                    boundaries.append(walk.hidden)
                found = _forward(walk, unit, unit if unit in for_inputs else Unit(0, unit.run))
                if found:
                    keep(f"in-{unit.index}", found)
                report(n + 1, steps)
            if for_gradients:
                _reverse(walk, units, for_gradients, boundaries, keep, report)
    return Statistics(load)


def _units(walk: Walk, needs: Mapping[str, frozenset[Need]]) -> list[Unit]:
    """One per block, in order; one more where weights outside the blocks are measured."""
    blocks = [(b.index, b.path, b.weights, _runner(walk, b)) for b in walk.anatomy.blocks]
    outside = tuple(w for w in walk.anatomy.outside if w.path in needs)
    if table := next((w.path for w in outside if w.operator == "embedding"), None):
        raise UserError(
            f"expected linear weights to measure, found the embedding {table}: exclude it, or "
            "choose a method that needs no data"
        )
    if outside:
        blocks.append((OUTSIDE, "", outside, blocks[0][3] if walk.whole else walk.tail))
    return [
        Unit(
            index,
            run,
            path,
            {_input_key(w): w.reads for w in weights if InputMoment() in needs.get(w.path, ())},
            {
                _gradient_key(w, need): (w.path, need)
                for w in weights
                for need in needs.get(w.path, ())
                if isinstance(need, OutputGradient)
            },
        )
        for index, path, weights, run in blocks
    ]


def measured(
    walk: Walk, needs: Mapping[str, frozenset[Need]]
) -> Iterator[tuple[int, dict[str, Moment]]]:
    """Input moments unit by unit on the dense stream, each gone when the next is asked for: for
    who needs no other block's to decide. Yields (block index, key → moment); the unit's own
    weights may be replaced before the next is asked for."""
    for unit in _units(walk, needs):
        with walk.standing(unit.path):
            tensors = _forward(walk, unit, unit)
            yield (
                unit.index,
                {
                    key: Moment.from_tensors(
                        {n: tensors[f"{key}/{n}"] for n in ("h", "mean", "count")}
                    )
                    for key in unit.reads
                },
            )


def _runner(walk: Walk, block: Any) -> Callable[[int, Tensor], Any]:
    return lambda index, hidden: walk.forward(block, index, hidden)


# -- forwards -------------------------------------------------------------------------------------
@torch.no_grad()
def _forward(walk: Walk, unit: Unit, wanted: Unit) -> dict[str, Tensor]:
    """Run a unit on every batch, measure the inputs of `wanted`, move the boundary behind it."""
    sums = {key: MomentSum() for key in wanted.reads}
    current = 0

    def listen(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[key].add(walk.rows(current, args[0].detach()))

        return hook

    hooks = [(walk.model.get_submodule(p), listen(k), True) for k, p in wanted.reads.items()]
    after = []
    with walk.standing(unit.path), listening(hooks):
        for current, hidden in enumerate(walk.hidden):
            out = unit.run(current, hidden)
            after.append(hidden if walk.whole or unit.index == OUTSIDE else out)
    walk.hidden = after
    paths = dict(wanted.reads)
    return {
        f"{key}/{name}": tensor
        for key, total in sums.items()
        for name, tensor in finite(total, paths[key], "activations").tensors().items()
    }


def finite(total: MomentSum, path: str, what: str) -> Moment:
    if total.count == 0:
        raise UserError(
            f"expected calibration data to reach {path}, found none: "
            "exclude this layer or calibrate on data that uses it"
        )
    moment = total.mean()
    if not bool(torch.isfinite(moment.h_nn).all()):
        raise UserError(
            f"expected finite {what}, found NaN or infinity at {path}: "
            "check the model in this dtype, or load it with --dtype float32"
        )
    return moment


# -- backwards ------------------------------------------------------------------------------------
def _reverse(
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
            sums = _Gradients(walk, units[n] if units[n] in wanted else Unit(0, units[n].run))
            with walk.standing(units[n].path):
                for index, hidden in enumerate(hidden_of):
                    grads[index] = sums.add(index, hidden, units[n].run, grads[index])
            if units[n] in wanted:
                keep(f"grad-{units[n].index}", sums.moments(terms))
        done += 1
        report(done, 2 * len(units))


def _from_loss(walk: Walk, unit: Unit, measured: bool, keep: Keep) -> tuple[list[Tensor], float]:
    """(gradients at the last boundary, number of loss terms); keeps the unit's own moments."""
    sums = _Gradients(walk, unit if measured else Unit(OUTSIDE, unit.run))
    terms, grads = 0.0, []

    def run(index: int, hidden: Tensor) -> Tensor:
        nonlocal terms
        total, count = walk.loss(index, unit.run(index, hidden))
        terms += count
        return total

    for index, hidden in enumerate(walk.hidden):
        grads.append(sums.add(index, hidden, run, None))
    if measured:
        keep(f"grad-{unit.index}", sums.moments(terms))
    return grads, terms


class _Gradients:
    """Sums of one unit's output gradients over the batches."""

    def __init__(self, walk: Walk, unit: Unit):
        self.walk, self.unit = walk, unit
        self.sums = {key: MomentSum() for key in unit.writes}
        self.positions = dict.fromkeys(unit.writes, 0)
        self.paths = sorted({path for path, _ in unit.writes.values()})

    def add(
        self, index: int, hidden: Tensor, run: Callable[[int, Tensor], Any], seed: Tensor | None
    ) -> Tensor:
        """Add one batch's moments; return the gradient at the unit's input."""
        outputs: dict[str, Tensor] = {}

        def listen(path: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
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
        for key, (path, need) in self.unit.writes.items():
            if (g := by_path.get(path)) is not None:
                self.sums[key].add(self.rows(index, g, need))
                self.positions[key] += self.walk.rows(index, g).shape[0]
        return results[0] if results[0] is not None else torch.zeros_like(leaf)

    def rows(self, index: int, g: Tensor, need: OutputGradient) -> Tensor:
        """(positions, o) rows of a gradient after the need's clipping and choice of positions."""
        mask = self.walk.masks[index]
        if mask is None and g.dim() == 3:
            mask = torch.ones(g.shape[:-1], dtype=torch.bool, device=g.device)
        if mask is None or mask.dim() != 2 or g[..., 0].numel() != mask.numel():
            return self.walk.rows(index, g)  # no positions to clip or to choose among
        g_btn = g.reshape(*mask.shape, g.shape[-1])
        return clip_rows(g_btn, mask, need.clip)[middle_positions(mask, need.middle)]

    def moments(self, terms: float) -> dict[str, Tensor]:
        """Mean over positions, times positions per term."""
        found: dict[str, Tensor] = {}
        for key, total in self.sums.items():
            tensors = finite(total, self.unit.writes[key][0], "gradients").tensors()
            tensors["h"] = tensors["h"] * (self.positions[key] / max(terms, 1.0))
            found.update({f"{key}/{name}": tensor for name, tensor in tensors.items()})
        return found
