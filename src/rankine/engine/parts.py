"""What a stage sees of the model as it stands: blocks that may be walked, and, where it asks for
them, the linear parts of an earlier stage's structures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from rankine.anatomy import Anatomy, Target, Weight, describe
from rankine.anatomy.reading import first_names
from rankine.engine.run import Run
from rankine.errors import UserError
from rankine.method import Compressor
from rankine.modules import expose, module_at
from rankine.recipe import Recipe
from rankine.statistics import as_walked
from rankine.structures import Structure


def seen_by(method: Compressor, run: Run) -> Anatomy:
    """The working copy's anatomy for a stage. One that measures gets blocks only where they are a
    chain; the others are spared the forward pass that tells."""
    if not run.streamed:  # whose experts, if any, are modules already
        expose(run.work)
    anatomy = describe(run.work)
    if method.inside:
        anatomy = with_parts(anatomy, run.work)
    targets = stage_targets(method, anatomy, run.recipe)
    walks = method.stream != "dense" or method.refinement is not None
    if walks or any(method.needs(target) for target in targets):
        return as_walked(anatomy, run.work, run.task, run.calibration[0])
    return anatomy


def stage_targets(method: Compressor, anatomy: Anatomy, recipe: Recipe) -> list[Target]:
    """What a stage works on. For a method that takes parts, a glob that names a factored weight
    names its factors."""
    include, exclude = recipe.include, recipe.exclude
    if method.inside:
        include, exclude = _widened(anatomy, include), _widened(anatomy, exclude)
        return _separable(anatomy, method.targets(anatomy, include, exclude))
    return method.targets(anatomy, include, exclude)


def _separable(anatomy: Anatomy, targets: Sequence[Target]) -> list[Target]:
    """Without the parts that share their matrix with what is no part (an output layer's with a
    factored table): they stay as they are. Those that share one among themselves are replaced
    together, each by its own."""
    known = {f"{weight.path}.weight": weight.path for weight in anatomy.weights}
    chosen = {target.members[0] for target in targets}
    for weight in anatomy.weights:
        first = known.get(weight.tied_with or "")
        if first is not None and (weight.path in chosen) != (first in chosen):
            raise UserError(
                f"expected {first} and {weight.path}, which share one matrix, to be compressed or "
                "excluded together: exclude both or neither"
            )
    return [t for t in targets if t.weights[0].tied_with in {None, *known}]


def _widened(anatomy: Anatomy, globs: Sequence[str]) -> tuple[str, ...]:
    paths = [weight.path for weight in anatomy.weights]
    wide: list[str] = []
    for glob in globs:
        within = f"{glob}.*"
        matching = [g for g in (glob, within) if any(fnmatchcase(p, g) for p in paths)]
        wide += matching or [glob]  # one that matches nothing is reported by `targets`
    return tuple(wide)


def with_parts(anatomy: Anatomy, model: nn.Module) -> Anatomy:
    """The anatomy with `down` and `up` in the place of each factored weight. A structure without
    linear layers (codes) has nothing left to offer."""
    names = first_names(model)
    blocks = tuple(
        replace(block, steps=tuple(_steps(block.steps, model, names))) for block in anatomy.blocks
    )
    outside = tuple(part for weight in anatomy.outside for part in _parts(weight, model, names))
    return replace(anatomy, blocks=blocks, outside=outside)


def _steps(
    steps: tuple[tuple[Weight, ...], ...], model: nn.Module, names: Mapping[int, str]
) -> Iterator[tuple[Weight, ...]]:
    """All `down` of a step read one activation; each `up` reads its own `down`."""
    for step in steps:
        layers = [_parts(weight, model, names) for weight in step]
        for depth in range(max(map(len, layers), default=0)):
            yield tuple(parts[depth] for parts in layers if depth < len(parts))


def _parts(weight: Weight, model: nn.Module, names: Mapping[int, str]) -> list[Weight]:
    """`names`: id of a parameter → the first name it has in the model."""
    module = module_at(model, weight.path)
    if not isinstance(getattr(module, "structure", None), Structure):
        return [weight]
    linears = [(name, m) for name, m in module.named_modules() if type(m) is nn.Linear]
    return [
        replace(
            weight,
            path=f"{weight.path}.{name}",
            shape=(linear.out_features, linear.in_features),
            operator="linear",
            reads=weight.reads if n == 0 else f"{weight.path}.{name}",
            rows=(),
            bias=linear.bias is not None,
            tied_with=_first_name(f"{weight.path}.{name}.weight", linear, names),
        )
        for n, (name, linear) in enumerate(linears)
    ]


def _first_name(own: str, linear: nn.Linear, names: Mapping[int, str]) -> str | None:
    first = names[id(linear.weight)]
    return None if first == own else first
