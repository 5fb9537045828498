"""What a stage sees of the model as it stands: blocks that may be walked, and, where it asks for
them, the linear parts of an earlier stage's structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from rankine.anatomy import Anatomy, Target, Weight, describe
from rankine.engine.run import Run
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
    return method.targets(anatomy, include, exclude)


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
    blocks = tuple(
        replace(block, steps=tuple(_steps(block.steps, model))) for block in anatomy.blocks
    )
    outside = tuple(part for weight in anatomy.outside for part in _parts(weight, model))
    return replace(anatomy, blocks=blocks, outside=outside)


def _steps(steps: tuple[tuple[Weight, ...], ...], model: nn.Module) -> Iterator[tuple[Weight, ...]]:
    """All `down` of a step read one activation; each `up` reads its own `down`."""
    for step in steps:
        layers = [_parts(weight, model) for weight in step]
        for depth in range(max(map(len, layers), default=0)):
            yield tuple(parts[depth] for parts in layers if depth < len(parts))


def _parts(weight: Weight, model: nn.Module) -> list[Weight]:
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
            tied_with=None,
        )
        for n, (name, linear) in enumerate(linears)
    ]
