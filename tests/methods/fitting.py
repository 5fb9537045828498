"""What the methods' own tests share: one weight, its evidence, and the method's verbs on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.anatomy import Target, Weight
from rankine.linalg.anchor import Cross
from rankine.method import Compressor
from rankine.patch import Patch
from rankine.statistics import Fisher, Moment, OutputGradient
from rankine.structures import LowRank, Structure


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64 standard normal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def correlated(count: int, width: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """(count, width) rows with a full covariance and a mean."""
    mix = normal(width, width, seed=seed + 100) * torch.logspace(0, -2, width).double()
    return normal(count, width, seed=seed) @ mix + offset * normal(width, seed=seed + 200)


def moment(x: Tensor) -> Moment:
    """Of rows."""
    return Moment(x.T @ x / len(x), x.mean(0), len(x))


@dataclass
class Layer:
    """y = W x + b with the inputs and output gradients that were seen; evidence and source of it.

    `seen`: the inputs behind a compressed prefix, where there is one."""

    w_oi: Tensor
    x_ni: Tensor
    g_no: Tensor | None = None
    bias_o: Tensor | None = None
    seen_ni: Tensor | None = None

    @property
    def target(self) -> Target:
        """The one weight."""
        shape = (self.w_oi.shape[0], self.w_oi.shape[1])
        return Target(
            (Weight("w", "linear", 0, shape, "linear", "w", (), self.bias_o is not None),)
        )

    def inputs(self, weight: Weight) -> Moment:
        """Of the stream that the solve sees."""
        return moment(self.x_ni if self.seen_ni is None else self.seen_ni)

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """Of the output."""
        assert self.g_no is not None
        return moment(self.g_no)

    def magnitude(self, weight: Weight) -> Tensor:
        """Of the inputs."""
        return self.x_ni.abs().mean(0)

    def fisher(self, weight: Weight) -> Fisher:
        """Each row an example of its own: E[(g_o x_i)²]."""
        assert self.g_no is not None
        squared_oi = self.g_no.square().T @ self.x_ni.square() / len(self.x_ni)
        return Fisher(squared_oi.sum(0), squared_oi.sum(1), len(self.x_ni), 1.0)

    def weight(self, weight: Weight) -> Tensor:
        """The matrix."""
        return self.w_oi

    def bias(self, weight: Weight) -> Tensor | None:
        """The layer's own."""
        return self.bias_o

    def cross(self, weight: Weight) -> Cross | None:
        """E[x x'ᵀ]."""
        if self.seen_ni is None:
            return None
        return Cross(self.x_ni.T @ self.seen_ni / len(self.x_ni))

    def fitted(self, method: Compressor, choice: Structure | int) -> tuple[Tensor, Patch]:
        """(Ŵ, the patch) of a rank or structure."""
        if isinstance(choice, int):
            bias = getattr(method.structure(self.target), "bias", False)
            choice = LowRank(choice, bias=bias)
        goal = method.goal(self.target, self, self)
        metric = method.metric(self.target, self)
        patch = method.fit(self.target, choice, goal, metric, torch.float64)
        parts = {n.removeprefix("w."): t for n, t in patch.tensors.items()}
        return choice.decode(parts), patch

    def losses(self, method: Compressor) -> dict[int, float]:
        """Rank → predicted loss, from the method's bid."""
        goal = method.goal(self.target, self, self)
        bid = method.bid(self.target, goal, method.metric(self.target, self), torch.float64)
        ranks = {o.structure.rank: o.loss for o in bid.options if hasattr(o.structure, "rank")}
        assert bid.options[-1].loss == 0  # the dense weight, so that nothing grows
        assert all(o.bits < bid.options[-1].bits for o in bid.options[:-1])
        return ranks

    def error(self, approx_oi: Tensor, bias_o: Tensor | None = None) -> float:
        """E‖y − ŷ‖² on the dense inputs."""
        difference = self.x_ni @ (self.w_oi - approx_oi).T
        if bias_o is not None:
            difference = difference - bias_o
        return float(difference.square().sum(1).mean())


def truncated(m: Tensor, rank: int) -> Tensor:
    """Eckart and Young's best matrix of a rank."""
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
