"""The survey: one walk forwards over the blocks gathers every declared input statistic, one walk
backwards the gradients. Memory is one block, its statistics and the boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import Block, Weight
from rankine.errors import UserError
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

#: Called after each block with (block index, number of blocks): a progress bar.
Progress = Callable[[int, int], None]
Store = Callable[[str], Mapping[str, Tensor] | None]
Keep = Callable[[str, Mapping[str, Tensor]], None]


class Statistics:
    """What the survey found, keyed by need and tensor. `load` brings a block's tensors back from
    the spool; only the block last asked for is held."""

    def __init__(self, load: Store):
        self._load = load
        self._block: tuple[int, Mapping[str, Tensor]] | None = None

    def inputs(self, weight: Weight) -> Moment:
        """Moment of what the weight reads: (i, i) and (i,)."""
        return self._moment(weight.block, f"in/{weight.reads}")

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """Moment of the gradient at what the weight writes: (o, o)."""
        return self._moment(weight.block, f"grad/{need.middle}/{need.clip}/{weight.path}")

    def _moment(self, block: int, key: str) -> Moment:
        if self._block is None or self._block[0] != block:
            tensors = self._load(f"{block}")
            if tensors is None:
                raise KeyError(f"no statistics for block {block}")
            self._block = (block, tensors)
        tensors = self._block[1]
        if f"{key}/h" not in tensors:
            raise KeyError(f"statistic {key} was not declared by `needs`")
        return Moment.from_tensors({n: tensors[f"{key}/{n}"] for n in ("h", "mean", "count")})


def survey(
    walk: Walk,
    needs: Mapping[str, frozenset[Need]],
    load: Store,
    keep: Keep,
    progress: Progress | None = None,
) -> Statistics:
    """Gather `needs` (weight path → needs). `load` and `keep` are the spool: block statistics
    that are there already (a resumed run) are not measured again."""
    wanted = {need for group in needs.values() for need in group}
    gradients = {n for n in wanted if isinstance(n, OutputGradient)}
    blocks = walk.anatomy.blocks
    measured = [b for b in blocks if any(w.path in needs for w in b.weights)]
    steps = len(blocks) * (2 if gradients else 1)
    if wanted and any(load(f"{b.index}") is None for b in measured):
        found: dict[int, dict[str, Tensor]] = {}
        boundaries: list[list[Tensor]] = []
        for n, block in enumerate(blocks):
            if gradients:
                boundaries.append(walk.hidden)
            found[block.index] = _inputs(walk, block, needs)
            if not gradients:
                keep(f"{block.index}", found.pop(block.index))
            if progress:
                progress(n + 1, steps)
        if gradients:
            _reverse(walk, needs, gradients, boundaries, found, keep, progress)
    return Statistics(load)


def _reads(block: Block, needs: Mapping[str, frozenset[Need]]) -> dict[str, str]:
    """Key of the statistic → path of the module whose input it is."""
    return {
        f"in/{w.reads}": w.reads for w in block.weights if InputMoment() in needs.get(w.path, ())
    }


@torch.no_grad()
def _inputs(walk: Walk, block: Block, needs: Mapping[str, frozenset[Need]]) -> dict[str, Tensor]:
    reads = _reads(block, needs)
    sums = {key: MomentSum() for key in reads}
    current = 0

    def listen(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[key].add(rows(args[0], walk.masks[current]))

        return hook

    hooks = [(walk.model.get_submodule(p), listen(k), True) for k, p in reads.items()]
    after = []
    with listening(hooks):
        for current, hidden in enumerate(walk.hidden):
            after.append(walk.forward(block, current, hidden))
    if not walk.whole:
        walk.hidden = after
    return _pack(sums)


def rows(x: Tensor, mask: Tensor) -> Tensor:
    """(positions, n) rows of an activation that the mask lets through. An activation without the
    mask's leading dimensions (a bank of experts, a pooled vector) is taken whole."""
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]).detach()
    if lead == mask.shape:
        return flat[mask.reshape(-1)]
    if flat.shape[0] == mask.numel():  # OPT flattens batch and time
        return flat[mask.reshape(-1)]
    return flat


def _pack(sums: Mapping[str, MomentSum], scale: float = 1.0) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, total in sums.items():
        if total.count == 0:
            raise UserError(
                f"expected calibration data to reach {key.split('/', 1)[1]}, found none: "
                "exclude this layer or calibrate on data that uses it"
            )
        moment = total.mean()
        if not bool(torch.isfinite(moment.h_nn).all()):
            raise UserError(
                f"expected finite activations, found NaN or infinity at {key.split('/', 1)[1]}: "
                "check the model in this dtype, or load it with --dtype float32"
            )
        out.update({f"{key}/{n}": t for n, t in moment.tensors().items()})
        out[f"{key}/h"] = out[f"{key}/h"] * scale
    return out


def _reverse(
    walk: Walk,
    needs: Mapping[str, frozenset[Need]],
    gradients: Iterable[OutputGradient],
    boundaries: list[list[Tensor]],
    found: dict[int, dict[str, Tensor]],
    keep: Keep,
    progress: Progress | None,
) -> None:
    """From the loss back to the first block, each block recomputed with gradients."""
    blocks = walk.anatomy.blocks
    if walk.whole:
        grads_of = [torch.empty(0)] * len(walk.batches)
    else:
        grads_of = [_tail_gradient(walk, n, h) for n, h in enumerate(walk.hidden)]
    for block in reversed(blocks):
        wanted = {
            f"grad/{g.middle}/{g.clip}/{w.path}": (w.path, g)
            for w in block.weights
            for g in gradients
            if g in needs.get(w.path, ())
        }
        sums = {key: MomentSum() for key in wanted}
        hidden_of = boundaries.pop()
        for n in range(len(walk.batches)):
            hidden, grad = hidden_of[n], grads_of[n]
            grads_of[n] = _block_gradients(walk, block, n, hidden, grad, wanted, sums)
        found[block.index].update(_pack(sums, walk.positions_per_term))
        keep(f"{block.index}", found.pop(block.index))
        if progress:
            progress(2 * len(blocks) - block.index, 2 * len(blocks))


def _tail_gradient(walk: Walk, index: int, hidden: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        loss = walk.loss(index, walk.tail(index, leaf))
        (grad,) = torch.autograd.grad(loss, leaf)
    return grad


def _block_gradients(
    walk: Walk,
    block: Block,
    index: int,
    hidden: Tensor,
    grad: Tensor,
    wanted: Mapping[str, tuple[str, OutputGradient]],
    sums: Mapping[str, MomentSum],
) -> Tensor:
    """Add the block's output-gradient moments; return the gradient at its input."""
    outputs: dict[str, Tensor] = {}

    def listen(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[path] = output if output.requires_grad else output.requires_grad_()
            return outputs[path]

        return hook

    paths = sorted({path for path, _ in wanted.values()})
    with (
        torch.enable_grad(),
        listening([(walk.model.get_submodule(p), listen(p), False) for p in paths]),
    ):
        if walk.whole:
            leaf, seed = torch.empty(0, requires_grad=True), None
            out = walk.loss(index, walk.task.run(walk.model, walk.batches[index]))
        else:
            leaf, seed = hidden.detach().requires_grad_(), grad
            out = walk.forward(block, index, leaf)
        measured = [outputs[p] for p in paths]
        results = torch.autograd.grad(out, [leaf, *measured], seed, allow_unused=True)
    by_path = dict(zip(paths, results[1:], strict=True))
    for key, (path, need) in wanted.items():
        g = by_path[path]
        if g is not None:
            sums[key].add(gradient_rows(g, walk.masks[index], need))
    return results[0] if results[0] is not None else leaf.detach()


def gradient_rows(g: Tensor, mask: Tensor, need: OutputGradient) -> Tensor:
    """(positions, o) rows of a gradient after the need's clipping and choice of positions."""
    if g.shape[:-1] != mask.shape and g[..., 0].numel() == mask.numel():
        g = g.reshape(*mask.shape, g.shape[-1])
    if g.shape[:-1] != mask.shape:
        return rows(g, mask)
    return clip_rows(g.detach(), need.clip)[middle_positions(mask, need.middle)]
