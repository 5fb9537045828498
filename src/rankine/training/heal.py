"""Healing: a compressed model is trained as a whole to make up for what it lost.

Two learners. `Healing` trains tensors where they are: what the structures declare trainable, or
everything. `LoraHealing` trains PEFT adapters on the linear layers inside the structures (`down`,
`up`) or of a dense model, and multiplies them in at the end, so that no bit is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import describe
from rankine.budget import Budget
from rankine.errors import UserError
from rankine.method import Learner
from rankine.patch import Patch
from rankine.patch import standing as found_in
from rankine.tasks import Task

ADAPTER = "default"


class Healing(Learner):
    """Trains `trainable` (default: what the structures of `patch` declare, see `declared`).

    The model stays in evaluation mode: no dropout, no moving statistics. Trained tensors are
    float32 meanwhile. `finish` gives them as a patch without modules: the sizes stay.
    """

    def __init__(self, patch: Patch, *, everything: bool = False, norms: bool = False):
        self.patch, self.everything, self.norms = patch, everything, norms
        self._dtypes: dict[str, torch.dtype] = {}

    def prepare(self, model: nn.Module, task: Task) -> None:
        """Leave a gradient on what is trained."""
        model.eval().requires_grad_(False)
        chosen = {id(p) for p in self._chosen(model)}
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                self._dtypes[name] = parameter.dtype
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def _chosen(self, model: nn.Module) -> Iterator[Tensor]:
        if self.everything:
            yield from (p for p in model.parameters() if p.is_floating_point())
            return
        yield from declared(model, self.patch)
        if self.norms:
            yield from norm_parameters(model)

    def finish(self, model: nn.Module, budget: Budget | None) -> Patch:
        """The trained tensors, by the names of those that tied ones follow."""
        tensors = {}
        for name, dtype in self._dtypes.items():
            parameter = model.get_parameter(name)
            tensors[self.patch.tied.get(name, name)] = parameter.detach().clone()
            parameter.data = parameter.data.to(dtype)
        return Patch(tensors=tensors)


class LoraHealing(Learner):
    """LoRA of `rank` and `alpha` on each linear layer of a structure, or on those in a dense
    model's blocks; layers that share their weight with others are left out, since a product added
    to it would change them all. `factors` holds what was trained, after `finish`, as
    {path: (B · alpha / rank, A)}."""

    def __init__(self, patch: Patch, *, rank: int = 8, alpha: float = 16.0):
        if rank < 1:
            raise UserError(f"expected lora_rank of at least 1, found {rank}")
        self.patch, self.rank, self.alpha = patch, rank, alpha
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._peft: Any = None

    def prepare(self, model: nn.Module, task: Task) -> None:
        """Put the adapters in place; B starts at zero, so the function does not change."""
        from peft import LoraConfig, get_peft_model

        model.eval().requires_grad_(False)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=adapter_places(model, self.patch)
        )
        self._peft = get_peft_model(model, config).eval()  # in place: `model` has them too
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def finish(self, model: nn.Module, budget: Budget | None) -> Patch:
        """Merge the adapters; the weights they stood on as a patch."""
        scale = self.alpha / self.rank
        for path, module in model.named_modules():
            if hasattr(module, "lora_A"):
                b, a = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight
                self.factors[path] = (b.detach() * scale, a.detach().clone())
        self._peft.merge_and_unload()
        self._peft = None
        return Patch(
            tensors={
                f"{path}.weight": model.get_parameter(f"{path}.weight").detach()
                for path in self.factors
            }
        )


def declared(model: nn.Module, patch: Patch) -> list[nn.Parameter]:
    """The parameters that the structures of a patch declare trainable; raises UserError when there
    are none. Where a later stage put another structure inside one (codes for a factor), that
    one's own declaration counts."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [f"{path}.{part}" for path, s in patch.modules.items() for part in s.trainable]
    found = [parameters[name] for name in names if name in parameters]
    if not found:
        raise UserError(
            "expected a compressed model with factors to train, found none: name a directory that "
            "`rankine compress` wrote, or use mode lora, or mode all to train every weight"
        )
    return found


def norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Scales and shifts of the normalisation layers."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            yield from module.parameters(recurse=False)


def adapter_places(model: nn.Module, patch: Patch) -> list[str]:
    """Paths of the linear layers that LoRA may stand on; raises UserError when there are none."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    if patch.modules:
        below = tuple(path + "." for path in patch.modules)
        linear = [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and (path + ".").startswith(below)
        ]
    else:
        weights = [w for block in describe(model).blocks for w in block.weights]
        linear = [w.path for w in weights if w.operator != "bank"]
    found = [path for path in linear if owners[id(model.get_submodule(path).weight)] == 1]
    if not found:
        raise UserError(
            "expected linear layers for LoRA to stand on, found none (quantized weights have "
            "none): use mode factors"
        )
    return found


def standing(model: nn.Module, patch: Patch) -> Patch:
    """`patch`, or where it is empty what the model's own modules say they are (one in memory that
    was never saved)."""
    return patch if patch.modules else found_in(model)
