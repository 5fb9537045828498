"""Two factors: W ≈ up · down, optionally with a function between them, optionally pivoted."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine import compat
from rankine.budget import Option
from rankine.errors import UserError
from rankine.linalg import lowrank, pivot
from rankine.metric import Metric
from rankine.structures.bank import LowRankBank, copies
from rankine.structures.base import (
    Parts,
    Structure,
    dtype_of,
    has_bias,
    meta_embedding,
    meta_linear,
    unknown_loss,
    weight_shape,
)

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}
PIVOT_DTYPE = torch.int32


@dataclass(frozen=True)
class LowRank(Structure):
    """W ≈ B A of the given rank: children `down` (A: inputs → rank) and `up` (B: rank → outputs).

    - `view`: "channel" for linear layers, "table" for embeddings (`down` is then the table).
    - `act`: a function between the factors; the weight cannot be merged then.
    - `pivoted`: PIFA's storage form: `down` holds `rank` rows of Ŵ, `up` the other rows'
      coefficients, `pivots` their places: rank² numbers fewer, the same matrix up to rounding.
    - `bias`: the module adds a bias even where the dense one had none (centred fits).
    - `shift`: `down` adds one too, before the function.
    """

    kind: ClassVar[str] = "low_rank"
    trainable: ClassVar[tuple[str, ...]] = ("down.weight", "up.weight")

    rank: int
    view: str = "channel"
    act: str | None = None
    pivoted: bool = False
    bias: bool = False
    shift: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"expected a rank of at least 1, found {self.rank!r}")
        if self.view not in ("channel", "table"):
            raise UserError(f'expected view "channel" or "table", found {self.view!r}')
        if self.act is not None and (not isinstance(self.act, str) or self.act not in ACTIVATIONS):
            raise UserError(f"expected act among {sorted(ACTIVATIONS)}, found {self.act!r}")
        if self.shift and self.act is None:
            raise UserError(
                "a shift between the factors moves a function: expected act, found none"
            )
        if self.pivoted and (self.act is not None or self.view == "table"):
            raise UserError("the pivoted form stores a linear layer without a function inside")

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Only without a function between the factors."""
        return self.act is None

    @property
    def bias_name(self) -> str:  # type: ignore[override]
        """The up factor adds the bias, except pivoted, where rows are scattered first."""
        return "bias" if self.pivoted else "up.bias"

    # -- pure functions -------------------------------------------------------------------------
    def encode(self, w: Tensor, metric: Metric, start: Parts | None = None) -> Parts:
        """The best rank-r pair in the metric (see linalg.lowrank), balanced; float64 inside."""
        self._check(w.shape, min(w.shape[-2:]))
        if metric.off_data == "zero":
            b, a = self._encode_on_data(w, metric)
        else:
            b, a = _solution(w, metric).factors(self.rank)
        return self.parts(b, a, w.dtype)

    def _encode_on_data(self, w: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        # A = Σ V_rᵀ S⁺: its rows stay in the range of the data.
        pt, inputs = metric.left(w), metric.inputs
        m = inputs.right_on_data(pt) if inputs is not None else pt
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        r = self.rank
        a = s[..., :r, None] * v[..., :r, :]
        a = inputs.right_pseudo_inverse(a) if inputs is not None else a
        return lowrank.balance(metric.left_inverse(u[..., :r]), a)

    def parts(self, b_or: Tensor, a_ri: Tensor, dtype: torch.dtype) -> Parts:
        """Named tensors of this storage form for the product B A."""
        if self.pivoted:
            rows, coefficients, pivots = pivot.encode(b_or, a_ri)
            return {
                "down.weight": rows.to(dtype).contiguous(),
                "up.weight": coefficients.to(dtype).contiguous(),
                "pivots": pivots,
            }
        down = a_ri.mT if self.view == "table" else a_ri
        return {
            "down.weight": down.to(dtype).contiguous(),
            "up.weight": b_or.to(dtype).contiguous(),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """B A (a matrix exists only without a function inside)."""
        if self.act is not None:
            raise UserError(f'"{self.act}" between the factors: there is no single weight')
        down, up = parts["down.weight"], parts["up.weight"]
        if self.pivoted:
            return pivot.decode(down, up, parts["pivots"])
        return up @ (down.mT if self.view == "table" else down)

    def bits(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """r(i + o) numbers; pivoted r(i + o) − r² and r indices; plus an added bias."""
        o, i = shape[-2:]
        r = self.rank
        number = dtype.itemsize * 8
        total = (r * (i + o) - (r * r if self.pivoted else 0)) * number
        total += r * PIVOT_DTYPE.itemsize * 8 if self.pivoted else 0
        total += o * number if self.bias else 0
        total += r * number if self.shift else 0
        return math.prod(shape[:-2]) * total

    def curve(self, w: Tensor, metric: Metric, dtype: torch.dtype | None = None) -> list[Option]:
        """All ranks that store less than the dense weight, from one spectrum."""
        tails = _solution(w, metric).tails
        losses = (metric.scale * tails).reshape(-1, tails.shape[-1]).sum(0).tolist()
        options = self.sizes(w.shape, dtype or w.dtype)
        return [dataclasses.replace(o, loss=losses[_rank(o.structure)]) for o in options]

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> list[Option]:
        """All ranks that store less than the dense weight."""
        dense = math.prod(shape) * dtype.itemsize * 8
        options = []
        for rank in range(1, min(shape[-2:]) + 1):
            sized = dataclasses.replace(self, rank=rank)
            bits = sized.bits(shape, dtype)
            if bits < dense:
                options.append(Option(sized, bits, unknown_loss(bits, shape, dtype)))
        return options

    def split(self, parts: Parts, rows: Sequence[int]) -> list[Parts]:
        """One `down` for all (the shared basis), and each its own rows of `up`."""
        if self.pivoted or self.view == "table" or self.bias:
            raise TypeError("only two plain factors can be shared")
        ups = parts["up.weight"].split(list(rows))
        return [{"down.weight": parts["down.weight"], "up.weight": up.clone()} for up in ups]

    def _check(self, shape: Sequence[int], most: int) -> None:
        if self.rank > most:
            raise UserError(
                f"expected a rank of at most {most} for a {tuple(shape[-2:])} weight, "
                f"found {self.rank}"
            )
        if self.pivoted and len(shape) > 2:
            raise UserError("the pivoted form stores one matrix at a time")

    def _check_bank(self) -> None:
        if self.pivoted or self.act is not None or self.bias:
            raise UserError(f"expected two plain factors for a bank of experts, found {self}")

    # -- module ---------------------------------------------------------------------------------
    def module(self, like: nn.Module) -> nn.Module:
        """`LowRankLinear`, `LowRankEmbedding` or `LowRankBank` on meta."""
        o, i = weight_shape(like)
        # A basis shared between layers may have more directions than one of them has outputs.
        shareable = not self.pivoted and self.view == "channel"
        self._check((o, i), max(o, i) if shareable else min(o, i))
        dtype = dtype_of(like)
        if hasattr(like, "num_embeddings") != (self.view == "table"):
            raise UserError(
                f'view "{self.view}" does not fit a {type(like).__name__}: '
                'embeddings want "table", linear layers "channel"'
            )
        if self.view == "table":
            return LowRankEmbedding(self, i, o, getattr(like, "padding_idx", None), dtype)
        bias = has_bias(like) or self.bias
        if (count := copies(like)) is not None:
            self._check_bank()
            return LowRankBank(self, self.rank, count, i, o, dtype)
        if self.pivoted:
            return PivotedLinear(self, i, o, bias, dtype)
        return LowRankLinear(self, i, o, bias, dtype)


def _rank(structure: object) -> int:
    assert isinstance(structure, LowRank)
    return structure.rank


def _solution(w: Tensor, metric: Metric) -> lowrank.Solution:
    return metric.once(w, "svd", lambda: lowrank.weighted(w, metric.inputs, metric.outputs))


class LowRankLinear(nn.Module):
    """y = up(act(down(x))): two plain linear layers, so PEFT, ONNX and compile see linears."""

    def __init__(self, structure: LowRank, i: int, o: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.structure = structure
        self.in_features, self.out_features = i, o
        self.down = meta_linear(i, structure.rank, structure.shift, dtype)
        self.up = meta_linear(structure.rank, o, bias, dtype)
        self.act = ACTIVATIONS[structure.act]() if structure.act else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        h = self.down(x)
        return self.up(h if self.act is None else self.act(h))

    @property
    def weight(self) -> Tensor:
        """The dense (o, i) weight, rebuilt at each access: slow, for code that insists on it. With
        a function inside there is none: shape and dtype alone, on meta (GPT-2 draws initial values
        into it while it is loaded)."""
        if self.structure.act is not None:
            shape = (self.out_features, self.in_features)
            return torch.empty(shape, dtype=self.up.weight.dtype, device="meta")
        return self.structure.decode({"down.weight": self.down.weight, "up.weight": self.up.weight})

    @property
    def bias(self) -> Tensor | None:
        """The bias, which the up factor adds."""
        return self.up.bias

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


#: Below this width a concatenation and a gather cost more than the rank² products they save
#: (`python -m benchmarks.speed.pivoted` measures it).
UNFOLD_BELOW = 1024


class PivotedLinear(nn.Module):
    """y_p = down(x), y_rest = up(y_p), then the rows take their places.

    That is the stored form. Narrow layers run faster as two plain factors, so for inference they
    keep [I; up] with its rows in place, built at the first call and never saved.
    """

    def __init__(self, structure: LowRank, i: int, o: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.structure = structure
        self.in_features, self.out_features = i, o
        r = structure.rank
        self.down = meta_linear(i, r, False, dtype)
        self.up = meta_linear(r, o - r, False, dtype)
        self.register_buffer("pivots", torch.empty(r, dtype=PIVOT_DTYPE, device="meta"))
        shape = torch.empty(o, dtype=dtype, device="meta") if bias else None
        self.bias = nn.Parameter(shape) if shape is not None else None
        self._unfolded: tuple[object, Tensor] | None = None
        self._places: tuple[object, Tensor] | None = None

    def places(self) -> Tensor:
        """(o,) where each output row comes from in [pivot rows, other rows]; kept while the pivots
        are unchanged."""
        pivots = self.pivots
        assert isinstance(pivots, Tensor)
        if torch.compiler.is_compiling():
            return self._find_places(pivots)
        state = (pivots.data_ptr(), compat.writes(pivots), pivots.device)
        if self._places is None or self._places[0] != state:
            self.check()
            self._places = (state, self._find_places(pivots))
        return self._places[1]

    def check(self) -> None:
        """Raises UserError unless the pivots are rows of the weight, in ascending order: they may
        come from a file of somebody else's."""
        pivots = self.pivots
        assert isinstance(pivots, Tensor)
        rows = [-1, *pivots.tolist(), self.out_features]
        if not all(before < after for before, after in itertools.pairwise(rows)):
            raise UserError(
                f"expected pivots in ascending order among {self.out_features} rows, found others: "
                "the checkpoint is damaged"
            )

    def _find_places(self, pivots: Tensor) -> Tensor:
        # Counting instead of sorting: torch.export can trace it, no size depends on data.
        rest = torch.ones(self.out_features, dtype=torch.long, device=pivots.device)
        rest[pivots.long()] = 0
        places = rest.cumsum(0) + len(pivots) - 1
        places[pivots.long()] = torch.arange(len(pivots), device=pivots.device)
        return places

    def unfolded(self) -> Tensor:
        """(o, r) second factor [I; up], every row in its place; kept while `up` is unchanged."""
        weight = self.up.weight
        state = (weight.data_ptr(), compat.writes(weight), weight.dtype, weight.device)
        if self._unfolded is None or self._unfolded[0] != state:
            eye = torch.eye(self.structure.rank, dtype=weight.dtype, device=weight.device)
            stacked = torch.cat([eye, weight.detach()])
            self._unfolded = (state, stacked.index_select(0, self.places()))
        return self._unfolded[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        y_pivot = self.down(x)
        narrow = max(self.in_features, self.out_features) < UNFOLD_BELOW
        if narrow and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return F.linear(y_pivot, self.unfolded(), self.bias)
        y = torch.cat([y_pivot, self.up(y_pivot)], -1).index_select(-1, self.places())
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense (o, i) weight, rebuilt at each access."""
        pivots = self.pivots
        assert isinstance(pivots, Tensor)
        return pivot.decode(self.down.weight, self.up.weight, pivots)

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, pivoted"


class LowRankEmbedding(nn.Module):
    """ids → up(table[ids]). A bias (the mean of a centred table) does not reach the padding row,
    which was not centred: one that was zero still is."""

    def __init__(self, structure: LowRank, v: int, d: int, padding: int | None, dtype: torch.dtype):
        super().__init__()
        self.structure = structure
        self.num_embeddings, self.embedding_dim, self.padding_idx = v, d, padding
        self.down = meta_embedding(v, structure.rank, padding, dtype)
        self.up = meta_linear(structure.rank, d, structure.bias, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids → (..., width)."""
        e = self.up(self.down(ids))
        if self.up.bias is None or self.padding_idx is None:
            return e
        return e - (ids == self.padding_idx).unsqueeze(-1) * self.up.bias

    @property
    def weight(self) -> Tensor:
        """The dense (vocabulary, width) table, rebuilt at each access."""
        return self(torch.arange(self.num_embeddings, device=self.down.weight.device))
