"""The survey: one walk forwards over the blocks gathers every declared input statistic, one walk
backwards the gradients. Memory is one block, its statistics and one boundary: finished moments go
to the spool at once, and boundaries that do not fit in memory wait in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankine.anatomy import Weight
from rankine.errors import UserError
from rankine.ranks import Group
from rankine.statistics.banks import BankGradientSum, BankSum, routed, routed_gradients
from rankine.statistics.boundaries import Boundaries
from rankine.statistics.fisher import Fisher, FisherSum, WeightFisher
from rankine.statistics.moments import (
    InputMagnitude,
    InputMoment,
    Lookups,
    LookupSum,
    MagnitudeSum,
    Moment,
    MomentSum,
    Need,
    OutputGradient,
    clip_rows,
    middle_positions,
)
from rankine.statistics.walk import Walk, listening
from rankine.structures.bank import Routing

#: Called after each block of each walk with (done, total): a progress bar.
Progress = Callable[[int, int], None]
Store = Callable[[str], Mapping[str, Tensor] | None]
Keep = Callable[[str, Mapping[str, Tensor]], None]
#: What sums an input's statistic.
InputSum = type[MomentSum] | type[MagnitudeSum] | type[LookupSum] | type[BankSum]
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
        return Moment.from_tensors(self._found("in", weight.block, _input_key(weight)))

    def magnitude(self, weight: Weight) -> Tensor:
        """(i,) mean absolute value of what the weight reads."""
        return self._found("in", weight.block, _magnitude_key(weight))["mean"]

    def lookups(self, weight: Weight) -> Tensor:
        """(vocabulary,) share of the lookups that each row of an embedding had."""
        share_v = self._found("in", weight.block, _lookups_key(weight))["share"]
        return torch.nn.functional.pad(share_v, (0, weight.shape[1] - len(share_v)))

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """Moment of the gradient at what the weight writes: (o, o)."""
        found = self._found("grad", weight.block, _gradient_key(weight, need))
        return Moment.from_tensors(found)

    def fisher(self, weight: Weight) -> Fisher:
        """Fisher information of the weight, per example."""
        return Fisher.from_tensors(self._found("grad", weight.block, _fisher_key(weight)))

    def _found(self, kind: str, block: int, key: str) -> dict[str, Tensor]:
        unit = f"{kind}-{block}"
        if self._held.get(kind, ("", {}))[0] != unit:
            self._held[kind] = (unit, self._load(unit) or {})
        tensors, prefix = self._held[kind][1], f"{key}/"
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if not found:
            raise KeyError(f"statistic {key} was not declared by `needs`")
        return found


def _input_key(weight: Weight) -> str:
    return weight.reads


def _magnitude_key(weight: Weight) -> str:
    return f"abs/{weight.reads}"


def _lookups_key(weight: Weight) -> str:
    return f"lookups/{weight.path}"


def _gradient_key(weight: Weight, need: OutputGradient) -> str:
    return f"{need.middle}/{need.clip}/{weight.path}"


def _fisher_key(weight: Weight) -> str:
    return f"fisher/{weight.path}"


@dataclass(frozen=True)
class Unit:
    """What is measured in one block (or, last, outside all of them), and how it is run.

    `reads`: key of the statistic → path of the module whose input it is, and its kind of sum;
    `writes`: key → path of the module whose output's gradient it is, and the need; `weights`:
    key → path of the module whose weight's gradient it is.
    """

    index: int
    run: Callable[[int, Tensor], Any]
    path: str = ""
    reads: Mapping[str, tuple[str, InputSum]] = field(default_factory=dict)
    writes: Mapping[str, tuple[str, OutputGradient]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def backwards(self) -> bool:
        """Does it take gradients?"""
        return bool(self.writes or self.weights)


def survey(
    walk: Walk,
    needs: Mapping[str, frozenset[Need]],
    load: Store,
    keep: Keep,
    progress: Progress | None = None,
) -> Statistics:
    """Gather `needs` (weight path → needs). `load` and `keep` are the spool: block statistics
    that are there already (a resumed run) are not measured again. In a group the first rank says
    what is there, and keeps what is found.

    Raises UserError naming the layer whose activations or gradients are missing or not finite.
    """
    units, group = _units(walk, needs), walk.group
    due = group.first(lambda: [_lacking(unit, load) for unit in units])
    for_inputs = [unit for unit, (inputs, _) in zip(units, due, strict=True) if inputs]
    for_gradients = [unit for unit, (_, gradients) in zip(units, due, strict=True) if gradients]
    backwards = any(u.backwards for u in units)
    steps = len(units) * (2 if backwards else 1)
    report = progress or (lambda done, total: None)
    if for_inputs or for_gradients:
        with Boundaries() as boundaries:
            for n, unit in enumerate(units):
                if for_gradients:
                    boundaries.append(walk.hidden)
                found = _forward(walk, unit, unit if unit in for_inputs else Unit(0, unit.run))
                if found and group.leads:
                    keep(f"in-{unit.index}", found)
                report(n + 1, steps)
            if for_gradients:
                _reverse(walk, units, for_gradients, boundaries, keep, report)
        group.barrier()  # the first rank has kept the last of it
    return Statistics(load)


def _lacking(unit: Unit, load: Store) -> tuple[bool, bool]:
    """Are its inputs still to be measured? Its gradients?"""
    inputs = bool(unit.reads) and load(f"in-{unit.index}") is None
    return inputs, unit.backwards and load(f"grad-{unit.index}") is None


def _units(walk: Walk, needs: Mapping[str, frozenset[Need]]) -> list[Unit]:
    """One per block, in order; one more where weights outside the blocks are measured."""
    blocks = [(b.index, b.path, b.weights, _runner(walk, b)) for b in walk.anatomy.blocks]
    outside = tuple(w for w in walk.anatomy.outside if w.path in needs)
    for weight in walk.anatomy.weights:
        if weight.operator == "embedding" and needs.get(weight.path, frozenset()) - {Lookups()}:
            raise UserError(
                f"expected linear weights to measure, found the embedding {weight.path}: exclude "
                "it, or choose a method that takes embeddings (svd, afm)"
            )
    if outside:
        blocks.append((OUTSIDE, "", outside, blocks[0][3] if walk.whole else walk.tail))
    return [
        Unit(
            index,
            run,
            path,
            _reads(weights, needs),
            {
                _gradient_key(w, need): (w.path, need)
                for w in weights
                for need in needs.get(w.path, ())
                if isinstance(need, OutputGradient)
            },
            {_fisher_key(w): w.path for w in weights if WeightFisher() in needs.get(w.path, ())},
        )
        for index, path, weights, run in blocks
    ]


def _reads(
    weights: Sequence[Weight], needs: Mapping[str, frozenset[Need]]
) -> dict[str, tuple[str, InputSum]]:
    found: dict[str, tuple[str, InputSum]] = {}
    for weight in weights:
        asked = needs.get(weight.path, ())
        if InputMoment() in asked:
            kind = BankSum if weight.operator == "bank" else MomentSum
            found[_input_key(weight)] = (weight.reads, kind)
        if InputMagnitude() in asked:
            found[_magnitude_key(weight)] = (weight.reads, MagnitudeSum)
        if Lookups() in asked and weight.operator == "embedding":
            found[_lookups_key(weight)] = (weight.path, LookupSum)
    return found


def measured(
    walk: Walk, needs: Mapping[str, frozenset[Need]]
) -> Iterator[tuple[int, dict[str, Moment]]]:
    """Input moments unit by unit on the dense stream, each gone when the next is asked for: for
    who needs no other block's to decide. Yields (block index, key → moment); the unit's own
    weights may be replaced before the next is asked for."""
    units = _units(walk, needs)
    last = max((n for n, unit in enumerate(units) if unit.reads), default=-1)
    for unit in units[: last + 1]:
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
    sums = {key: kind() for key, (_, kind) in wanted.reads.items()}
    current = 0

    def listen(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[key].add(_rows(walk, current, module, args))

        return hook

    paths = {key: path for key, (path, _) in wanted.reads.items()}
    hooks = [(walk.model.get_submodule(p), listen(k), True) for k, p in paths.items()]
    after = []
    with walk.standing(unit.path), listening(hooks):
        for current, hidden in enumerate(walk.hidden):
            out = unit.run(current, hidden)
            after.append(hidden if walk.whole or unit.index == OUTSIDE else out)
    walk.hidden = after
    return {
        f"{key}/{name}": tensor
        for key, total in sums.items()
        for name, tensor in finite(total, paths[key], "activations", walk.group).tensors().items()
    }


def _rows(walk: Walk, index: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
    """What a module reads, by position; of an embedding the ids, without those that only pad; of a
    bank the rows of each expert."""
    x = args[0].detach()
    if len(args) > 1 and isinstance(args[1], Routing):
        return routed(x, args[1], walk.masks[index])
    if not hasattr(module, "num_embeddings"):
        return walk.rows(index, x)
    ids_t1 = walk.rows(index, x.unsqueeze(-1))
    padding = getattr(module, "padding_idx", None)
    return ids_t1 if padding is None else ids_t1[ids_t1 != padding].unsqueeze(-1)


def _is_bank(walk: Walk, path: str) -> bool:
    return walk.anatomy.weight(path).operator == "bank"


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
            unit = units[n] if units[n] in wanted else Unit(0, units[n].run)
            sums = _Gradients(walk, unit, terms)
            with walk.standing(units[n].path):
                for index, hidden in enumerate(hidden_of):
                    grads[index] = sums.add(index, hidden, units[n].run, grads[index])
            if units[n] in wanted:
                _keep_gradients(sums, keep)
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
        _keep_gradients(sums, keep)
    return grads, terms


def _keep_gradients(sums: _Gradients, keep: Keep) -> None:
    found = sums.found()
    if sums.walk.group.leads:
        keep(f"grad-{sums.unit.index}", found)


class _Gradients:
    """Sums over the batches of what one unit's gradients are measured for. `terms`: by batch, each
    example's number of loss terms; filled while the loss itself is run."""

    def __init__(self, walk: Walk, unit: Unit, terms: Sequence[Tensor]):
        self.walk, self.unit, self.terms = walk, unit, terms
        self.sums: dict[str, MomentSum | BankGradientSum] = {
            key: BankGradientSum() if _is_bank(walk, path) else MomentSum()
            for key, (path, _) in unit.writes.items()
        }
        self.positions = dict.fromkeys(unit.writes, 0)
        self.fishers = {path: FisherSum() for path in unit.weights.values()}
        self.paths = sorted({path for path, _ in unit.writes.values()} | set(self.fishers))

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
        for key, (path, need) in self.unit.writes.items():
            if (g := by_path.get(path)) is None:
                continue
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
            tensors = finite(total, self.unit.writes[key][0], "gradients", group).tensors()
            positions = group.total(self.positions[key])
            tensors["h"] = tensors["h"] * (positions / max(terms, 1.0))
            found.update({f"{key}/{name}": tensor for name, tensor in tensors.items()})
        for key, path in self.unit.weights.items():
            tensors = finite(self.fishers[path], path, "gradients", group).tensors()
            found.update({f"{key}/{name}": tensor for name, tensor in tensors.items()})
        return found
