"""What a weight becomes, as a value: frozen, hashable, JSON-clean; pure functions on tensors.

A structure's fields are its size, so it is at once the point on a curve, the allocator's choice
and the entry in config.json. `encode` / `decode` / `bits` / `curve` take any leading batch
dimensions and never see a model; `module` builds on meta the module that stands where another
stood, and its state dict is exactly the parts (plus a bias).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankine.budget import Option
from rankine.errors import UserError, suggest
from rankine.metric import Metric

#: Named tensors, relative to the module that holds them ("down.weight", "up.weight").
Parts = dict[str, Tensor]

#: No dimension of a tensor is larger.
MOST = 2**31 - 1

_KINDS: dict[str, type[Structure]] = {}


@dataclasses.dataclass(frozen=True)
class Structure:
    """Base of all structures. Subclasses are frozen dataclasses with a class variable `kind`."""

    kind: ClassVar[str] = ""
    #: Can the parts be multiplied into one dense weight? (False with a function in between.)
    mergeable: ClassVar[bool] = True
    #: Names of the parts that healing may train ("" prefix matches all).
    trainable: ClassVar[tuple[str, ...]] = ()
    #: Where the module keeps the bias it took over.
    bias_name: ClassVar[str] = "bias"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            _KINDS[cls.kind] = cls

    # -- the four functions ---------------------------------------------------------------------
    def encode(self, w: Tensor, metric: Metric, start: Parts | None = None) -> Parts:
        """Best parts of this size for a (..., o, i) goal in `metric`; `start` may warm-start."""
        raise TypeError(f"{type(self).__name__} cannot be fitted to a matrix")

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The dense (..., o, i) matrix the parts stand for."""
        raise TypeError(f"{type(self).__name__} has no dense form")

    def bits(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Stored bits for a (..., o, i) weight in `dtype`, metadata included, before fitting."""
        raise TypeError(f"{type(self).__name__} does not count its bits")

    def curve(self, w: Tensor, metric: Metric, dtype: torch.dtype | None = None) -> list[Option]:
        """Every size of this kind with its loss, from one decomposition where there is one."""
        parts = self.encode(w, metric)
        loss = float(metric.loss(w, self.decode(parts)).sum())
        return [Option(self, self.bits(w.shape, dtype or w.dtype), loss)]

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> list[Option]:
        """The options of `curve` before anything is known of the weight; a loss only says that
        more bits are better."""
        bits = self.bits(shape, dtype)
        return [Option(self, bits, unknown_loss(bits, shape, dtype))]

    def split(self, parts: Parts, rows: Sequence[int]) -> list[Parts]:
        """Parts of weights that were fitted as one stack, `rows` of it each; a tensor that they
        share is the same object in all of them."""
        raise TypeError(f"{type(self).__name__} cannot be shared by several weights")

    def module(self, like: nn.Module) -> nn.Module:
        """The module (on meta) that stands where `like` stood."""
        raise TypeError(f"{type(self).__name__} builds no module")

    # -- JSON -----------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """`{"kind": ..., field: value}`; fields at their default are left out."""
        out: dict[str, Any] = {"kind": self.kind}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.default is not dataclasses.MISSING and value == f.default:
                continue
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Structure:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def from_json(data: Mapping[str, Any]) -> Structure:
    """The structure a config.json entry describes; raises UserError on anything unknown."""
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise UserError(f'expected a structure with a "kind", found {data!r:.80}')
    kind = data["kind"]
    if kind not in _KINDS:
        raise UserError(f'unknown structure "{kind}"; {suggest(kind, list(_KINDS))}')
    fields = {k: v for k, v in data.items() if k != "kind"}
    for name, value in fields.items():
        _check_sizes(kind, name, value)
    try:
        return _KINDS[kind]._from_fields(fields)
    except (TypeError, ValueError) as error:
        raise UserError(
            f'structure "{kind}" does not fit its fields {fields!r:.200}: {error!s:.200}'
        ) from None


def _check_sizes(kind: str, name: str, value: Any) -> None:
    """Numbers in a structure are sizes, or small: none is larger than any dimension."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= MOST:  # NaN neither
            raise UserError(
                f'expected numbers up to {MOST:,} in the field {name!r:.40} of a "{kind}" '
                f"structure, found {number!r:.40}"
            )


def unknown_loss(bits: int, shape: Sequence[int], dtype: torch.dtype) -> float:
    """Stands for the loss of a size that was not measured: the share of the bits that it saves."""
    return 1.0 - bits / (math.prod(shape) * dtype.itemsize * 8)


def weight_shape(like: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of the matrix a module stands for."""
    if hasattr(like, "in_features") and hasattr(like, "out_features"):
        return int(like.out_features), int(like.in_features)  # type: ignore[arg-type]
    if hasattr(like, "num_embeddings") and hasattr(like, "embedding_dim"):  # factored ones too
        return int(like.embedding_dim), int(like.num_embeddings)  # type: ignore[arg-type]
    if type(like).__name__ == "Conv1D":  # transformers' GPT-2 linear, stored transposed
        weight = like.weight
        return int(weight.shape[1]), int(weight.shape[0])  # type: ignore[index,union-attr]
    raise UserError(
        f"expected a linear layer, a Conv1D or an embedding, found {type(like).__name__}: "
        "exclude it, or convert it first"
    )


def matrix(module: nn.Module) -> Tensor:
    """The (o, i) matrix of a dense module: y = x Wᵀ; an embedding is a map on one-hot ids."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        return weight.mT
    return weight


def check_module(module: nn.Module) -> None:
    """Raises UserError where the tensors that a module was filled with cannot be right."""
    if (check := getattr(module, "check", None)) is not None:
        check()


def has_bias(module: nn.Module) -> bool:
    """Does the module add a bias?"""
    return getattr(module, "bias", None) is not None


def meta_linear(i: int, o: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without storage: the loader gives it some."""
    return nn.Linear(i, o, bias=bias, device="meta", dtype=dtype)


def meta_embedding(v: int, d: int, padding: int | None, dtype: torch.dtype) -> nn.Embedding:
    """An embedding without storage."""
    table = nn.Embedding(v, d, device="meta", dtype=dtype)
    # nn.Embedding zeroes its padding row at construction, which meta tensors cannot do.
    table.padding_idx = padding
    return table


def dtype_of(module: nn.Module) -> torch.dtype:
    """dtype of a module's floating tensors, or the default when it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()
