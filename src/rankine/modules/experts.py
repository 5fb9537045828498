"""Stacked experts that can be compressed: transformers keeps the matrices of a layer's experts as
two (experts, outputs, inputs) parameters of one module. Here each of them becomes a module of its
own, a bank, when something else takes its place: `experts.down_proj` makes way for
`experts.down_bank`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankine import compat
from rankine.structures.bank import Bank, Routing, grouped


class ExpertBank(nn.Module):
    """Every token through the two matrices of its experts. Takes over the parameters of the module
    it stands for; what is not replaced stays a parameter, so that transformers goes on reading and
    writing it as it does in the dense model."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.banks = compat.expert_banks(like)
        self.has_gate = like.has_gate
        self.num_experts: int = like.num_experts  # type: ignore[assignment]
        self._apply_gate = compat.expert_gate(like)
        for name in self.banks.values():
            self.register_parameter(name, like.get_parameter(name))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, width), (tokens, k) experts and (tokens, k) weights → (tokens, width)."""
        total, k = top_k_index.shape
        expert_s = top_k_index.reshape(-1)
        order_s = torch.argsort(expert_s, stable=True)
        counts = torch.bincount(expert_s, minlength=self.num_experts).tolist()
        routing = Routing(counts, order_s // k, total)
        first, second = self.banks
        x_si = self._through(first, hidden_states[routing.tokens_s], routing)
        y_so = self._through(second, self._apply_gate(x_si), routing)
        y_so = y_so * top_k_weights.reshape(-1)[order_s, None]
        back_s = torch.argsort(order_s)
        return y_so[back_s].view(total, k, -1).sum(1).to(hidden_states.dtype)

    def _through(self, bank: str, x_si: Tensor, routing: Routing) -> Tensor:
        if bank in dict(self.named_children()):
            y_so: Tensor = getattr(self, bank)(x_si, routing)
            return y_so
        return grouped(x_si, self.get_parameter(self.banks[bank]), routing)

    def put(self, bank: str, module: nn.Module) -> None:
        """`module` in the place of a bank, or of the parameter that it was so far."""
        compat.parameters_of(self).pop(self.banks[bank], None)
        setattr(self, bank, module)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; a bank that is still a parameter as a module around it, which is no
    part of the model. Raises AttributeError where there is neither."""
    owner, name = _parameter(model, path)
    return model.get_submodule(path) if name is None else Bank(owner.get_parameter(name))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a path where something stands, in its training mode."""
    parent, _, leaf = path.rpartition(".")
    owner, name = _parameter(model, path)
    if name is not None:
        owner = adopt(model, parent)
    module.train(module_at(model, path).training if name is None else owner.training)
    if isinstance(owner, ExpertBank):
        owner.put(leaf, module)
    else:
        setattr(owner, leaf, module)


def _parameter(model: nn.Module, path: str) -> tuple[nn.Module, str | None]:
    """(the module that owns a path, the name of the parameter that a bank at it still is)."""
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    return owner, compat.expert_banks(owner).get(leaf)


def adopt(model: nn.Module, path: str) -> ExpertBank:
    """The bank of experts at `path`, put there in place of the family's own module."""
    owner = model.get_submodule(path)
    if isinstance(owner, ExpertBank):
        return owner
    experts = ExpertBank(owner)
    experts.train(owner.training)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, experts)
    return experts


def expose(model: nn.Module) -> nn.Module:
    """Make every bank a module, in place, so that hooks can listen to it: for a model that is
    measured, not for one that is saved."""
    for path, module in list(model.named_modules()):
        for bank, name in compat.expert_banks(module).items():
            adopt(model, path).put(bank, Bank(module.get_parameter(name)))
    return model


def conceal(model: nn.Module) -> nn.Module:
    """Undo `expose`, in place: dense banks are parameters again, under the names that transformers
    reads and writes."""
    for experts in model.modules():
        if not isinstance(experts, ExpertBank):
            continue
        for bank, name in experts.banks.items():
            if isinstance(dense := getattr(experts, bank, None), Bank):
                delattr(experts, bank)
                experts.register_parameter(name, dense.weight)
    return model
