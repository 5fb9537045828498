"""The survey: one walk forwards over the blocks gathers every declared input statistic, one walk
backwards the gradients. Memory is one block, its statistics and one boundary: finished moments go
to the spool at once, and boundaries that do not fit in memory wait in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankine.checkpoint.streamed import Resident
from rankine.statistics.banks import routed
from rankine.statistics.boundaries import IN_MEMORY, Boundaries
from rankine.statistics.found import Statistics, Store
from rankine.statistics.moments import Moment, Need
from rankine.statistics.reverse import reverse
from rankine.statistics.sums import Measured, finite
from rankine.statistics.units import OUTSIDE, Unit, units_of
from rankine.statistics.walk import Walk, listening
from rankine.structures.bank import Routing

#: Called after each block of each walk with (done, total): a progress bar.
Progress = Callable[[int, int], None]
Keep = Callable[[str, Mapping[str, Tensor]], None]
#: Called with what was found so far and the unit that is now in the spool.
After = Callable[[Statistics, str], None]


def survey(
    walk: Walk,
    needs: Mapping[str, frozenset[Need]],
    load: Store,
    keep: Keep,
    progress: Progress | None = None,
    after: After | None = None,
    scratch: Path | None = None,
) -> Statistics:
    """Gather `needs` (weight path → needs). `load` and `keep` are the spool: block statistics
    that are there already (a resumed run) are not measured again. `after` is called with what was
    found whenever a unit ("in-3", "grad-3") is in the spool. Boundaries that do not fit in memory
    wait in files below `scratch`, all of them where the weights do not either. In a group the first
    rank says what is there, and keeps what is found.

    Raises UserError naming the layer whose activations or gradients are missing or not finite.
    """
    units, group = units_of(walk, needs), walk.group
    found = Statistics(load, walk.bases)
    report, call = progress or (lambda done, total: None), after or (lambda statistics, unit: None)

    def kept(name: str, tensors: Mapping[str, Tensor]) -> None:
        if group.leads:
            keep(name, tensors)
        found.hold(name, tensors)
        call(found, name)

    names = [f"{kind}-{unit.index}" for unit in units for kind in ("in", "grad")]
    known = group.first(lambda: [name for name in names if load(name) is not None])
    for name in known:
        call(found, name)
    for_inputs = [u for u in units if u.reads and f"in-{u.index}" not in known]
    for_gradients = [u for u in units if u.backwards and f"grad-{u.index}" not in known]
    steps = len(units) * (2 if any(u.backwards for u in units) else 1)
    if for_inputs or for_gradients:
        in_memory = IN_MEMORY if isinstance(walk.weights, Resident) else 0
        with Boundaries(in_memory, scratch) as boundaries:
            for n, unit in enumerate(units):
                if for_gradients:
                    boundaries.append(walk.hidden)
                wanted = unit if unit in for_inputs else Unit(0, unit.run)
                with walk.standing(unit.path):
                    tensors = named_tensors(forward(walk, unit, wanted))
                    if tensors:
                        kept(f"in-{unit.index}", tensors)
                    del tensors  # a float64 triangle for every input of the block
                report(n + 1, steps)
            if for_gradients:
                found.let_go()
                reverse(walk, units, for_gradients, boundaries, kept, report)
        group.barrier()  # the first rank has kept the last of it
    found.let_go()
    return found


def measured(
    walk: Walk, needs: Mapping[str, frozenset[Need]]
) -> Iterator[tuple[int, dict[str, Moment]]]:
    """Input moments unit by unit on the dense stream, each gone when the next is asked for: for
    who needs no other block's to decide. Yields (block index, key → moment); the unit's own
    weights may be replaced before the next is asked for."""
    units = units_of(walk, needs)
    last = max((n for n, unit in enumerate(units) if unit.reads), default=-1)
    for unit in units[: last + 1]:
        with walk.standing(unit.path):
            found = forward(walk, unit, unit)
            yield unit.index, {k: m for k, m in found.items() if isinstance(m, Moment)}
            found.clear()


# -- forwards -------------------------------------------------------------------------------------
@torch.no_grad()
def forward(walk: Walk, unit: Unit, wanted: Unit) -> dict[str, Measured]:
    """Run a unit on every batch, measure the inputs of `wanted`, move the boundary behind it."""
    sums: dict[str, Any] = {key: make() for key, (_, make) in wanted.reads.items()}
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
        key: finite(sums.pop(key), path, "activations", walk.group) for key, path in paths.items()
    }


def named_tensors(found: Mapping[str, Measured]) -> dict[str, Tensor]:
    """What the spool keeps of a unit."""
    return {
        f"{key}/{name}": tensor
        for key, statistic in found.items()
        for name, tensor in statistic.tensors().items()
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
