"""Does a config.json fit the weights that lie beside it? Asked on meta, where nothing has a size:
whoever wrote the file decides how much memory loading it would take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rankine.checkpoint.form import CONFIG, Header, headers, weight_files
from rankine.checkpoint.save import patch_of
from rankine.errors import UserError

#: How often something is repeated, by the names that configs give it: lists of that length are
#: made as soon as a config is read.
REPEATED = re.compile(r"(n|num)_(\w+_)?(layers?|experts|blocks|labels|stages)|\w*layers|depth")
MOST_REPEATED = 100_000

#: An architecture may have more tensors, and more numbers, than its file: what is tied is stored
#: once, and a head that was not trained yet not at all.
TENSORS = 8, 1024
NUMBERS = 4, 1 << 24
#: Bytes of tables that are computed from the config alone and never saved: honest ones (positions,
#: masks) have megabytes, whatever the weights of a small model have.
TABLES = 1 << 30


def check_counts(config: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for a config that repeats something absurdly often."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, where)
        elif isinstance(value, int) and REPEATED.fullmatch(name) and value > MOST_REPEATED:
            raise UserError(
                f"expected {name} of at most {MOST_REPEATED:,} in {where}, found {value}"
            )


def check_lengths(config: Mapping[str, Any], tensors: int, directory: Path) -> None:
    """Raises UserError for a plan of far more modules or ties than there are tensors."""
    plan = config.get("quantization_config", config)
    for name in ("modules", "tied") if isinstance(plan, Mapping) else ():
        if isinstance(plan.get(name), Mapping) and len(plan[name]) > TENSORS[0] * tensors:
            raise UserError(
                f'expected "{name}" for the {tensors:,} tensors in {directory}, found '
                f"{len(plan[name]):,}: copy the directory again"
            )


def check_fits(cls: Any, config: Any, directory: Path) -> None:
    """Build the architecture without memory and hold it against the headers of the weights.

    Raises UserError where it cannot be built, has far more tensors or numbers than there are in
    the files, or where a tensor has another shape or kind than its namesake in them.
    """
    stored = headers(*weight_files(directory))
    try:
        with _at_most(TENSORS[0] * len(stored) + TENSORS[1], directory), torch.device("meta"):
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
            patch_of(model).swap(model, getattr(model, "base_model_prefix", ""))
    except UserError:
        raise
    except Exception as error:  # whatever a config made transformers do is the config's fault
        raise unbuildable(directory, error) from error
    _compare(model, stored, directory)


def unbuildable(directory: Path, error: Exception) -> UserError:
    """The sentence for a config that transformers stumbled over."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
    return UserError(
        f"expected a {CONFIG} in {directory} that transformers can build a model of, found one "
        f"that it cannot ({reason:.200}): copy it again"
    )


@contextmanager
def _at_most(tensors: int, directory: Path) -> Iterator[None]:
    """Inside, models may register so many parameters, and then a UserError is raised."""
    left = tensors

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(
                f"expected a {CONFIG} for the tensors in {directory}, found one that asks for more "
                f"than {tensors:,}: copy both from the same place again"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _compare(model: nn.Module, stored: Mapping[str, Header], directory: Path) -> None:
    slots = model.state_dict(keep_vars=True)
    for name in slots.keys() & stored.keys():
        slot, found = slots[name], stored[name]
        if tuple(slot.shape) != found.shape or slot.is_floating_point() != found.floating:
            raise UserError(
                f"expected weights in {directory} of the sizes that its {CONFIG} states, "
                f"{tuple(slot.shape)} for {name}, found {found.dtype} {found.shape}: "
                "copy both from the same place again"
            )
    asked = sum(t.numel() for t in {id(t): t for t in slots.values()}.values())
    there = sum(header.numbers for header in stored.values())
    if asked > NUMBERS[0] * there + NUMBERS[1]:
        raise UserError(
            f"expected a {CONFIG} for the {there:,} numbers of the weights in {directory}, found "
            f"one that asks for {asked:,}: copy both from the same place again"
        )
    saved = set(map(id, slots.values()))
    tables = sum(t.numel() * t.element_size() for t in model.buffers() if id(t) not in saved)
    if tables > TABLES:
        raise UserError(
            f"expected a {CONFIG} in {directory} whose tables (positions, masks) take at most "
            f"{TABLES:,} bytes, found one that asks for {tables:,}: copy it again"
        )
