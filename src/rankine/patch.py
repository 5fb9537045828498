"""What stands where: the only result of a method, and the only thing that operates on a model.

A Rankine checkpoint is a dense architecture plus a patch. Fitting returns patches, the journal
stores them, the swap applies them, bits are counted on them, config.json is a patch without its
tensors, and the loader applies it on meta. It works for any `nn.Module`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankine import compat, structures
from rankine.anatomy import Target
from rankine.anatomy.reading import first_names
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.modules import module_at, put
from rankine.structures.base import Parts, Structure, has_bias, matrix


@dataclass(frozen=True)
class Patch:
    """Modules, their tensors, and the few fields of the model's config that change.

    - `modules`: module path → the structure that stands there.
    - `tensors`: full tensor name → value (absent in a patch read from config.json).
    - `tied`: tensor name → the tensor name whose storage it shares.
    - `config`: model config field → value.
    - `adapter`: module paths whose parts are saved beside the base (a PEFT folder).
    """

    modules: Mapping[str, Structure] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: frozenset[str] = frozenset()

    # -- build ----------------------------------------------------------------------------------
    @classmethod
    def of(cls, path: str, structure: Structure, parts: Parts, bias: Tensor | None = None) -> Patch:
        """The patch that puts `structure` with `parts` (and a bias) at `path`."""
        tensors = {f"{path}.{name}": tensor for name, tensor in parts.items()}
        if bias is not None:
            tensors[f"{path}.{structure.bias_name}"] = bias
        return cls({path: structure}, tensors)

    @classmethod
    def over(
        cls, target: Target, structure: Structure, parts: Parts, bias: Tensor | None = None
    ) -> Patch:
        """The patch of a target that may have several weights: a group's members share the parts
        of their stack; an output layer tied to a table shares the table."""
        if target.kind == "group":
            rows = [weight.shape[0] for weight in target.weights]
            return cls._shared(target.members, structure, structure.split(parts, rows))
        path = target.members[0]
        patch = own = cls.of(path, structure, parts, bias)
        for weight in target.weights[1:]:
            if weight.operator == "embedding":
                tied = {weight.path + name.removeprefix(path): name for name in own.tensors}
                patch |= cls({weight.path: structure}, tied=tied)
            else:
                patch |= cls._reading(weight.path, path, parts)
        return patch

    @classmethod
    def _shared(cls, paths: Sequence[str], structure: Structure, members: Sequence[Parts]) -> Patch:
        """One structure at several places; a part that is one tensor in several of them is stored
        at the first."""
        tensors: dict[str, Tensor] = {}
        tied: dict[str, str] = {}
        homes: dict[int, str] = {}
        for path, parts in zip(paths, members, strict=True):
            for part, tensor in parts.items():
                name = f"{path}.{part}"
                home = homes.setdefault(id(tensor), name)
                if home == name:
                    tensors[name] = tensor
                else:
                    tied[name] = home
        return cls(dict.fromkeys(paths, structure), tensors, tied)

    @classmethod
    def _reading(cls, head: str, table: str, parts: Parts) -> Patch:
        """The output layer of a factored table: W = down · upᵀ, `down` being the table's own."""
        rank = parts["down.weight"].shape[1]
        turned = {f"{head}.down.weight": parts["up.weight"].mT.contiguous()}
        tied = {f"{head}.up.weight": f"{table}.down.weight"}
        return cls({head: structures.LowRank(rank)}, turned, tied)

    def __or__(self, later: Patch) -> Patch:
        """Both, the later one winning where they meet. A module that `later` replaces takes the
        earlier one's tensors, ties and inner patches with it."""
        gone = tuple(p + "." for p in later.modules)

        def stays(name: str) -> bool:
            return not (name + ".").startswith(gone) if gone else True

        return Patch(
            {**{p: s for p, s in self.modules.items() if stays(p)}, **later.modules},
            {**{n: t for n, t in self.tensors.items() if stays(n)}, **later.tensors},
            {
                **{a: b for a, b in self.tied.items() if stays(a) and stays(b)},
                **later.tied,
            },
            {**self.config, **later.config},
            frozenset(p for p in self.adapter if stays(p)) | later.adapter,
        )

    def __bool__(self) -> bool:
        return bool(self.modules or self.tensors or self.tied or self.config)

    # -- count ----------------------------------------------------------------------------------
    def bits(self) -> int:
        """Stored bits of all tensors, tied ones once."""
        return sum(
            t.numel() * t.element_size() * 8
            for name, t in self.tensors.items()
            if name not in self.tied
        )

    # -- apply ----------------------------------------------------------------------------------
    def swap(self, model: nn.Module, prefix: str = "") -> list[str]:
        """Put the modules (on meta) in place; returns the paths that were found.

        `prefix` is the model's base prefix ("model"): a checkpoint of another head class has its
        paths with or without it (integration: path prefixes).
        """
        found = []
        # Outer modules first: a later stage may address parts of an earlier structure.
        for path in sorted(self.modules, key=lambda p: p.count(".")):
            place = resolve(model, path, prefix)
            if place is None:
                continue
            put(model, place, self.modules[path].module(module_at(model, place)))
            found.append(place)
        return found

    def apply(self, model: nn.Module) -> nn.Module:
        """Swap and fill in place. Tensors the patch does not carry keep the model's own (a bias),
        and so does a module that stands there already; raises UserError when a module would be
        left without one of its tensors."""
        new = replace(self, modules={p: s for p, s in self.modules.items() if self._new(model, p)})
        old = dict(model.state_dict(keep_vars=True))
        devices = {path: _device(model, path) for path in new.modules}
        new.swap(model)
        for path in new.modules:
            new._fill(model.get_submodule(path), path, old, devices[path])
        for name, tensor in self.tensors.items():
            if not any(name.startswith(path + ".") for path in self.modules):
                assign(model, name, tensor)
        self.tie(model)
        apply_config(model, self.config)
        return model

    def _new(self, model: nn.Module, path: str) -> bool:
        """Is there something to put at `path`: a tensor of its own, or another structure?"""
        inner = tuple(f"{p}." for p in self.modules if p.startswith(path + "."))
        below = (n for n in (*self.tensors, *self.tied) if n.startswith(path + "."))
        if any(not name.startswith(inner) for name in below):
            return True
        place = resolve(model, path)
        standing = None if place is None else model.get_submodule(place)
        return getattr(standing, "structure", None) != self.modules[path]

    def _fill(
        self, module: nn.Module, path: str, old: Mapping[str, Tensor], device: torch.device
    ) -> None:
        structure = self.modules[path]
        for name, slot in list(module.state_dict(keep_vars=True).items()):
            if slot.device.type != "meta":
                continue
            full = f"{path}.{name}"
            value = self.tensors.get(full)
            if value is None and full in self.tied:
                value = self.tensors.get(self.tied[full])
            if value is None and name == structure.bias_name:
                value = old.get(f"{path}.bias")
                if value is None and isinstance(structure, structures.LowRank):
                    value = torch.zeros(slot.shape, dtype=slot.dtype)
            if value is None:
                if any(p != path and full.startswith(p + ".") for p in self.modules):
                    continue  # an inner module of this patch fills it
                raise UserError(f"expected a tensor {full} in the patch, found none")
            if tuple(value.shape) != tuple(slot.shape):
                raise UserError(
                    f"expected {full} of shape {tuple(slot.shape)}, found {tuple(value.shape)}"
                )
            assign(module, name, value.to(device))

    def tie(self, model: nn.Module) -> None:
        """Make tied parameters the same object, and tell transformers about them."""
        check_tied(model, self.tied)
        for name, source in self.tied.items():
            owner, leaf = _owner(model, name)
            source_owner, source_leaf = _owner(model, source)
            setattr(owner, leaf, getattr(source_owner, source_leaf))
        if self.tied:
            from rankine.compat import declare_tied

            declare_tied(model, self.tied)

    # -- read and write -------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """The patch without its tensors: what config.json holds."""
        return {
            "modules": {p: s.to_json() for p, s in sorted(self.modules.items())},
            "tied": dict(sorted(self.tied.items())),
            "config": dict(self.config),
            "adapter": sorted(self.adapter),
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> Patch:
        """Inverse of `to_json`; raises UserError on unknown structures, and on anything else that
        `to_json` does not write."""
        modules, tied, config = (_object(data, name) for name in ("modules", "tied", "config"))
        adapter = data.get("adapter", ())
        listed = adapter if isinstance(adapter, list | tuple) else [adapter]
        for name in (*tied.values(), *listed):
            if not isinstance(name, str):
                raise UserError(f'expected names in "tied" and "adapter", found {name!r:.40}')
        return cls(
            {p: structures.from_json(s) for p, s in modules.items()},
            dict(tensors or {}),
            tied,
            config,
            frozenset(listed),
        )

    def without_tensors(self) -> Patch:
        """The plan of this patch."""
        return replace(self, tensors={})


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name, {})
    if not isinstance(found, Mapping):
        raise UserError(f'expected an object as "{name}" of a patch, found {found!r:.40}')
    return dict(found)


def resolve(model: nn.Module, path: str, prefix: str = "") -> str | None:
    """The path as given, else without or with the base prefix, else None."""
    candidates = [path]
    if prefix:
        candidates += [path.removeprefix(prefix + "."), f"{prefix}.{path}"]
    for candidate in candidates:
        try:
            module_at(model, candidate)
        except AttributeError:
            continue
        return candidate
    return None


def dense_patch(model: nn.Module, paths: list[str] | None = None) -> Patch:
    """The patch that merges structured modules back into plain weights (all, or `paths`)."""
    merged = Patch()
    for path, module in list(model.named_modules()):
        structure = getattr(module, "structure", None)
        if not isinstance(structure, Structure) or (paths is not None and path not in paths):
            continue
        if isinstance(module, nn.Embedding) or structure.kind == "dense":
            continue
        parent = path.rpartition(".")[0]
        if parent and isinstance(
            getattr(model.get_submodule(parent), "structure", None), Structure
        ):
            continue  # a term of a sum: the sum merges as a whole
        if not structure.mergeable:
            raise UserError(f"{path} has a function between its factors: it has no dense weight")
        with torch.no_grad():
            weight = module.weight.detach().clone()  # type: ignore[operator,union-attr]
        bias = module.bias.detach().clone() if has_bias(module) else None  # type: ignore
        merged |= Patch.of(path, _dense_like(module), {"weight": weight}, bias)
    return merged


def narrow(
    model: nn.Module,
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor] | None = None,
) -> Patch:
    """The patch that keeps the given output rows and input columns of dense weights, and the given
    entries (along the last dimension) of other tensors by name.

    Coupled units (an FFN unit, a KV group, a hidden dimension) name what lives or dies together;
    this one function slices them, biases included. What shared its storage goes on sharing it.
    """
    tensors = {
        name: model.get_parameter(name).detach()[..., index].clone()
        for name, index in (vectors or {}).items()
    }
    patch = Patch(tensors=tensors)
    first = first_names(model)
    for path in {**rows, **columns}:
        module = module_at(model, path)
        w = matrix(module)
        bias = getattr(module, "bias", None)
        if path in rows:
            w = w[..., rows[path], :]
            bias = bias[rows[path]] if bias is not None else None
        if path in columns:
            w = w[..., columns[path]]
        dense = _dense_like(module, (w.shape[-2], w.shape[-1]))
        source = first.get(id(module.weight), "")
        if source in patch.tensors and source != f"{path}.weight":
            tied = Patch({path: dense}, tied={f"{path}.weight": source})
            patch |= replace(tied, tensors={} if bias is None else {f"{path}.bias": bias})
            continue
        weight = dense.encode(w.detach(), Metric())["weight"].clone().contiguous()
        patch |= Patch.of(path, dense, {"weight": weight}, bias)
    return patch


def _dense_like(module: nn.Module, shape: tuple[int, int] | None = None) -> structures.Dense:
    table = hasattr(module, "num_embeddings")
    return structures.Dense(shape, "table" if table else "channel")


def standing(model: nn.Module) -> Patch:
    """What the modules of a model say they are (no tensors); the terms of a sum go with it."""
    found = {
        path: structure
        for path, module in model.named_modules()
        if isinstance(structure := getattr(module, "structure", None), Structure)
    }
    inner = {p for p in found for other in found if p.startswith(other + ".")}
    return Patch({path: s for path, s in found.items() if path not in inner})


def stored_bits(model: nn.Module, *paths: str) -> int:
    """Bits of the tensors below modules, shared ones once, without biases that the dense layers
    had too."""
    found: dict[int, Tensor] = {}
    for path in paths:
        module = module_at(model, path)
        structure = getattr(module, "structure", None)
        skip = "" if structure is None else structure.bias_name
        adds_bias = bool(getattr(structure, "bias", False))
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name not in (skip, "bias") or adds_bias:
                found[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() * 8 for tensor in found.values())


def check_tied(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Raises UserError unless each tensor that is tied is one, and so is the one it is tied to."""
    names = set(model.state_dict(keep_vars=True)) if tied else set()
    for name in (*tied, *tied.values()):
        if name not in names:
            raise UserError(f"expected ties between tensors of the model, found {name!r:.80}")


def apply_config(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Set changed fields on the model's config, where it has one."""
    config = getattr(model, "config", None)
    for name, value in fields.items():
        if config is not None:
            setattr(config, name, value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return (model.get_submodule(parent) if parent else model), leaf


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor into the slot of that name, meta or not; floating parameters are trainable. A
    slot of its kind takes the values instead, so that what shares it goes on sharing it."""
    owner, leaf = _owner(model, name)
    slot = compat.parameters_of(owner).get(leaf)
    if slot is not None and not slot.is_meta and _alike(slot, value):
        with torch.no_grad():
            slot.copy_(value)
        return
    if leaf in compat.buffers_of(owner):
        compat.buffers_of(owner)[leaf] = value
        return
    if isinstance(owner, nn.LayerNorm):  # the only one that keeps its width beside its weight
        owner.normalized_shape = tuple(value.shape)
    trainable = value.is_floating_point()
    held = nn.Parameter(value.detach(), requires_grad=trainable)
    compat.parameters_of(owner)[leaf] = held


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _device(model: nn.Module, path: str) -> torch.device:
    try:
        tensor = next(module_at(model, path).parameters(), None)
    except AttributeError:
        tensor = None
    return tensor.device if tensor is not None else torch.device("cpu")
