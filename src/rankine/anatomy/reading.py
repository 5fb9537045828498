"""What the walks look up in a model: which modules are weights, and what each is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from rankine import compat
from rankine.anatomy.parts import Weight
from rankine.structures.bank import Bank, copies
from rankine.structures.base import Structure, has_bias, weight_shape

#: Row ranges of the parts of a fused matrix: (role, start, stop).
Rows = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Reading:
    """A model with what the walks look up: its weights' modules by path, in registration order,
    the structured modules that are no matrix (nothing below them is a weight), and the first
    name of each parameter (for ties; identity, because tensors on meta have no storage)."""

    model: nn.Module
    leaves: Mapping[str, nn.Module]
    opaque: frozenset[str]
    first_names: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> Reading:
        """Read a model."""
        leaves: dict[str, nn.Module] = {}
        opaque: set[str] = set()
        for path, module in _leaves(model, "", {id(model)}):
            if _is_weight(module):
                leaves[path] = module
            else:
                opaque.add(path)
        return cls(model, leaves, frozenset(opaque), first_names(model))

    def weight(
        self, path: str, role: str, block: int, reads: str | None = None, rows: Rows = ()
    ) -> Weight:
        """The weight at a path; it reads what the module at `reads` reads (its own by default)."""
        module = self.leaves[path]
        return Weight(
            path=path,
            role=role,
            block=block,
            shape=weight_shape(module),
            operator=operator(module),
            reads=reads or path,
            rows=rows,
            bias=has_bias(module),
            tied_with=self._tied_with(path, module),
            copies=copies(module) or 1,
        )

    def outputs(self, path: str) -> int:
        """Output rows of the weight at a path."""
        return weight_shape(self.leaves[path])[0]

    def below(self, path: str) -> list[str]:
        """Paths of the weights inside the module at `path` ("" is the model)."""
        return [leaf for leaf in self.leaves if not path or leaf.startswith(path + ".")]

    def hidden(self, path: str) -> bool:
        """Does the path lead to or into a structured module that is no matrix?"""
        return any((path + ".").startswith(outer + ".") for outer in self.opaque)

    def module(self, path: str) -> nn.Module | None:
        """The module at a path, None where there is none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _tied_with(self, path: str, module: nn.Module) -> str | None:
        own = path.removesuffix("_bank") + "_proj"  # a bank that is still a parameter
        for name, parameter in module.named_parameters():
            first = self.first_names[id(parameter)]
            if not name.endswith("bias") and first != own and not first.startswith(path + "."):
                return first
        return None


def first_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter → its first name."""
    found: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), name)
    return found


def operator(module: nn.Module) -> str:
    """linear | conv1d | embedding | bank."""
    if hasattr(module, "num_embeddings"):
        return "embedding"
    if copies(module) is not None:
        return "bank"
    return "conv1d" if type(module).__name__ == "Conv1D" else "linear"


def stacked(sizes: Mapping[str, int]) -> Rows:
    """One part's rows behind the other's."""
    rows, start = [], 0
    for role, size in sizes.items():
        rows.append((role, start, start + size))
        start += size
    return tuple(rows)


def by_head(heads: int, head_dim: int) -> Rows:
    """q, k and v of head 0, then those of head 1, ... (GPT-NeoX)."""
    parts = [role for _ in range(heads) for role in "qkv"]
    return tuple((role, n * head_dim, (n + 1) * head_dim) for n, role in enumerate(parts))


def _is_structured(module: nn.Module) -> bool:
    return isinstance(getattr(module, "structure", None), Structure)


def _is_weight(module: nn.Module) -> bool:
    if _is_structured(module):
        return hasattr(module, "in_features") or hasattr(module, "num_embeddings")
    if isinstance(module, nn.Embedding):
        # Scaled and offset tables, learned positions: a plain table cannot stand there.
        return type(module).forward is nn.Embedding.forward
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # torch's own attention reads its tensors and never calls it
    return isinstance(module, nn.Linear | Bank) or type(module).__name__ == "Conv1D"


def _leaves(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Weights and structured modules below a module, each object once, at its first path."""
    for name, child in module.named_children():
        if id(child) in seen:
            continue
        seen.add(id(child))
        below = join(path, name)
        if _is_weight(child) or _is_structured(child):
            yield below, child
        else:
            for bank, name in compat.expert_banks(child).items():  # parameters so far
                yield join(below, bank), Bank(child.get_parameter(name))
            yield from _leaves(child, below, seen)


def join(*parts: str) -> str:
    """A dotted path; empty parts vanish."""
    return ".".join(part for part in parts if part)
