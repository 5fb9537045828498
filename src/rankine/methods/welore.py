"""WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients (2024, arXiv
2407.11239).

    z_i = (s_i − s_min) / (s_max − s_min),   k = #{i: z_i ≥ t},   one threshold t for all weights

The weights with heavy-tailed spectra, which training made low-rank (LRC), are cut; those that
would not become smaller (N-LRC) stay dense. No data. t is the lowest that fits the budget, in
stored bits. The paper states effective rank reductions, 1 − Σk / Σd with d = min(o, i), and looks t
up in a table for two models: `budget_kind="rank"` reads `keep` as Σk / Σd and factorizes where more
than half of a weight's ranks go, so the stored share is another one than `keep` (the report
measures it). WeLore-PEFT, which trains the factors of the LRC alone, is `heal` with mode factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.anatomy import Target
from rankine.budget import Bid, Ceiling, Option
from rankine.errors import UserError, suggest
from rankine.fitting import bits_of_tied, dense_bid
from rankine.linalg import lowrank
from rankine.method import Bench, Card, Compressor, method
from rankine.metric import Metric
from rankine.structures import Dense, LowRank

NORMS, BUDGETS = ("minmax", "quantile", "energy"), ("parameters", "rank")
#: Share of a weight's ranks that must go before it is factorized (budget in ranks): the break-even
#: of a square weight.
LOW_RANK = 0.5
#: The largest value may be an outlier: "quantile" puts this quantile in its place.
QUANTILE = 0.95
#: What is cut at all is more than nothing.
SMALLEST = 1e-12


@method
@dataclass(frozen=True)
class WeLore(Compressor):
    """Ranks by one threshold on normalised singular values.

    - `norm`: "minmax" (the paper), "quantile" (the 95 % quantile for the largest value), or "energy" (the share of the energy from a value on).
    - `budget_kind`: what `keep` is a share of: "parameters" (stored bits) or "rank" (the paper).
    """  # noqa: E501

    card = Card(
        name="welore",
        title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank "
        "Gradients",
        reference="arXiv:2407.11239",
        authors="Jaiswal, Ajay and Yin, Lu and Zhang, Zhenyu and Liu, Shiwei and Zhao, Jiawei and "
        "Tian, Yuandong and Wang, Zhangyang",
        family="low-rank",
        summary="SVD, ranks by one threshold on normalised singular values, no data",
    )

    norm: str = "minmax"
    budget_kind: str = "parameters"

    def __post_init__(self) -> None:
        for value, known in ((self.norm, NORMS), (self.budget_kind, BUDGETS)):
            if value not in known:
                raise UserError(f'unknown value "{value}" of welore; {suggest(value, known)}')

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """Dense, and every rank; the loss of a rank is the largest normalised value it cuts."""
        z_n = normalised(lowrank.weighted(goal).squared_n.sqrt(), self.norm).clamp_min(SMALLEST)
        template, options = self.structure(target), []
        assert isinstance(template, LowRank)
        for rank, cut in enumerate(z_n.tolist()[1:], 1):
            structure = dataclasses.replace(template, rank=rank)
            bits = structure.bits(goal.shape, dtype) + bits_of_tied(target, structure, dtype)
            options.append(Option(structure, bits, cut, self.name))
        bid = dense_bid(target, goal, dtype, options)
        if self.budget_kind == "rank":  # ranks are counted beyond break-even, too
            return dataclasses.replace(bid, options=(*options, bid.options[-1]))
        return bid

    def allocate(self, bids: Sequence[Bid], bits: int, bench: Bench) -> dict[str, Option]:
        """The lowest threshold that fits."""
        if self.budget_kind == "parameters":
            return Ceiling().allocate(bids, bits)
        ranks = sum(len(bid.options) for bid in bids)
        budget = bits * ranks // sum(bid.dense_bits for bid in bids)
        kept = Ceiling().allocate([_in_ranks(bid) for bid in bids], budget)
        return {bid.target: _low_rank_or_dense(bid, kept[bid.target].bits) for bid in bids}


def normalised(s_n: Tensor, norm: str) -> Tensor:
    """(n,) singular values, largest first, on a scale that all weights have in common; a flat
    spectrum has nothing low-rank about it and is 1."""
    if norm == "energy":
        squared_n = s_n.square()
        return squared_n.flip(-1).cumsum(-1).flip(-1) / squared_n.sum().clamp_min(SMALLEST)
    top = s_n.quantile(QUANTILE) if norm == "quantile" else s_n[0]
    spread = top - s_n[-1]
    return (s_n - s_n[-1]) / spread if float(spread) > 0 else torch.ones_like(s_n)


def _in_ranks(bid: Bid) -> Bid:
    """The bid with ranks for bits: 1, 2, ... and all of them for the dense weight."""
    options = (dataclasses.replace(o, bits=rank) for rank, o in enumerate(bid.options, 1))
    return dataclasses.replace(bid, options=tuple(options))


def _low_rank_or_dense(bid: Bid, rank: int) -> Option:
    """The option of a rank, or dense where half of the ranks or more are left."""
    chosen = bid.options[rank - 1]
    reduced = 1 - rank / len(bid.options)
    dense = next(option for option in bid.options if isinstance(option.structure, Dense))
    return chosen if reduced > LOW_RANK else dense
