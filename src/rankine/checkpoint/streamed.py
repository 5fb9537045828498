"""A model whose weights stay on the disk: they come into memory block by block, while a block
computes, and go again. What a method replaced comes from the journal instead.

The skeleton is the model on meta. Hooks on its blocks, and on the modules outside them, bring the
weights in and out, so whatever runs the model runs it streamed; `standing` keeps a part in memory
for longer.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankine import compat
from rankine.checkpoint.form import tensor_names, weight_files
from rankine.checkpoint.shards import Place, Spec, read_place, read_places, write_shards
from rankine.patch import Patch

#: Bytes of weights per file.
SHARD = 5 * 10**9


class Weights(Protocol):
    """Where the weights of a working copy lie while nobody computes with them."""

    def standing(self, *paths: str) -> Any:
        """A context in which the modules at `paths` hold their weights."""

    def taken(self, patch: Patch, file: Path | None) -> Patch:
        """A patch was put in place whose tensors `file` keeps; returns what to remember of it."""


#: glibc's, where that is the process's C library.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Hand freed memory to the system: glibc keeps pieces below 32 MB, a block's weights among
    them, for a process that may want them again."""
    if _trim is not None:
        _trim(0)


def unchanged(name: str, tensor: Tensor) -> Tensor:
    """As it is stored."""
    return tensor


class Resident:
    """All in memory, all the time."""

    @contextmanager
    def standing(self, *paths: str) -> Iterator[None]:
        """Nothing to do."""
        yield

    def taken(self, patch: Patch, file: Path | None) -> Patch:
        """The patch itself."""
        return patch


@dataclass
class Streamed:
    """`places`: tensor name → where it lies. `dtype`: that of computation. `blocks`: paths of the
    modules that come and go as a whole."""

    model: Any  # a PreTrainedModel on meta
    places: dict[str, Place]
    dtype: torch.dtype
    blocks: list[str]
    _depth: Counter[str] = field(default_factory=Counter)
    _meta: dict[str, Tensor] = field(default_factory=dict)
    _change: Callable[[str, Tensor], Tensor] = unchanged

    def __post_init__(self) -> None:
        self._meta = dict(self.model.state_dict(keep_vars=True))
        for path, module in self.model.named_modules():
            inside = any(path.startswith(block + ".") for block in self.blocks)
            if not inside and (path in self.blocks or _own(module)):
                self._listen(path, module)

    # -- in and out -----------------------------------------------------------------------------
    @contextmanager
    def standing(self, *paths: str) -> Iterator[None]:
        """The units that hold these modules have their weights in memory."""
        with ExitStack() as stack:
            for unit in dict.fromkeys(self._unit(path) for path in paths):
                self._enter(unit)
                stack.callback(self._leave, unit)
            yield

    def taken(self, patch: Patch, file: Path | None) -> Patch:
        """From now on the patched modules' tensors are those of `file`, a journal's entry."""
        assert file is not None
        for path in patch.modules:
            old = {n: (self.places.pop(n), self._meta.pop(n)) for n in self._below(path)}
            for name in self.model.get_submodule(path).state_dict():
                full = f"{path}.{name}"
                if full not in patch.tensors and full not in patch.tied:  # a bias left as it was
                    kept = old[full] if full in old else old[f"{path}.bias"]
                    self.places[full], self._meta[full] = kept
        for name, tensor in patch.tensors.items():
            self.places[name] = Place(file, name)
            self._meta[name] = nn.Parameter(tensor.to("meta"), requires_grad=False)
        for name, source in patch.tied.items():
            self.places[name], self._meta[name] = self.places[source], self._meta[source]
        for path in patch.modules:
            if self._unit(path) == path and path not in self.blocks:  # new, and has no hooks yet
                self.blocks.append(path)
                self._listen(path, self.model.get_submodule(path))
        return patch.without_tensors()

    def _below(self, path: str) -> list[str]:
        return [name for name in self.places if name.startswith(path + ".")]

    @contextmanager
    def through(self, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Inside, every tensor comes into memory as `change(name, tensor)`."""
        self._change = change
        try:
            yield
        finally:
            self._change = unchanged

    def read(self, name: str) -> Tensor:
        """One tensor as it is, or will be, stored."""
        meta = self._meta[name]
        dtype = meta.dtype if meta.is_floating_point() else None
        return read_place(self.places[name], dtype)

    def write(self, directory: Path, limit: int = SHARD) -> None:
        """A transformers checkpoint of the model as it stands, one tensor in memory at a time."""
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = next(s.dtype for s in self.specs() if s.dtype.is_floating_point)
        config.save_pretrained(directory)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(directory)
        write_shards(directory, self.specs(), self.read, limit)

    def specs(self) -> list[Spec]:
        """What is saved, tied tensors under their first name, in the state dict's order."""
        seen: set[int] = set()
        found = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Spec.of(name, tensor))
        return found

    def _unit(self, path: str) -> str:
        for block in self.blocks:
            if path == block or path.startswith(block + "."):
                return block
        return path

    def _enter(self, unit: str) -> None:
        self._depth[unit] += 1
        if self._depth[unit] > 1:
            return
        slots = self._slots(unit)
        places = {name: self.places[name] for name in slots}
        for name, tensor in read_places(places, self.dtype):
            self._meta.setdefault(name, slots[name])
            _place(self.model, name, self._change(name, tensor))

    def _leave(self, unit: str) -> None:
        self._depth[unit] -= 1
        if self._depth[unit]:
            return
        for name, slot in self._slots(unit).items():
            meta = self._meta.get(name)
            if meta is None or meta.shape != slot.shape:  # tried, and not taken
                meta = nn.Parameter(slot.detach().to("meta"), requires_grad=False)
            _place(self.model, name, meta)
        give_back()

    def _slots(self, unit: str) -> dict[str, Tensor]:
        module = self.model.get_submodule(unit) if unit else self.model
        whole = unit in self.blocks
        found = module.state_dict(keep_vars=True) if whole else _own(module)
        prefix = unit + "." if unit else ""
        return {prefix + name: tensor for name, tensor in found.items()}

    def _listen(self, path: str, module: nn.Module) -> None:
        # A walk replaces the forward of blocks that only pass on: those need no weights.
        def enter(module: nn.Module, args: Any) -> None:
            if "forward" not in vars(module):
                self._enter(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if "forward" not in vars(module):
                self._leave(path)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The saved tensors that a module holds itself, not through its children."""
    hidden, buffers = compat.unsaved_buffers(module), compat.buffers_of(module)
    held = {**compat.parameters_of(module), **{n: b for n, b in buffers.items() if n not in hidden}}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    if leaf in compat.buffers_of(owner):
        compat.buffers_of(owner)[leaf] = tensor
        return
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    compat.parameters_of(owner)[leaf] = tensor


def places_of(model: nn.Module, directory: Path) -> dict[str, Place] | None:
    """Every saved tensor of `model` → its place in the checkpoint; None where the files name
    tensors otherwise than the model does (transformers then converts them while loading)."""
    files = {n: Place(file, n) for file in weight_files(directory) for n in tensor_names(file)}
    prefix = getattr(model, "base_model_prefix", "") + "."
    slots = model.state_dict(keep_vars=True)
    found: dict[str, Place] = {}
    by_tensor: dict[int, Place] = {}
    for name, slot in slots.items():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        place = next((files[s] for s in spellings if s in files), None)
        if place is not None:
            found[name] = by_tensor[id(slot)] = place
    for name, slot in slots.items():
        if name not in found and id(slot) in by_tensor:  # tied
            found[name] = by_tensor[id(slot)]
    known = {place.name for place in found.values()}
    whole = found.keys() == slots.keys() and known == files.keys()
    return found if whole else None
