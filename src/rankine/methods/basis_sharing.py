"""Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression (ICLR 2025,
arXiv 2410.03765).

    [W_1; ...; W_g] ≈ [C_1; ...; C_g] B      min ‖([W_1; ...; W_g] − C B) S‖_F,   S Sᵀ = Σ_l X_lᵀX_l

The weights of one role in `group` neighbouring blocks, stacked along their outputs, get one basis B
(`down`, tied and stored once) and coefficients C_l (`up`) of their own, by one SVD whitened with
the sum of the layers' input moments. Some roles are not shared (the paper finds that o and down
lose by it): they are a group of one, which is SVD-LLM. Every target keeps the same share of its
bits; where the blocks do not divide by `group`, the last ones form a smaller group (which the
reference gives the ranks of a full one). From 40 % removed on, the reference refits the
coefficients to the inputs of the compressed model: `update` fits the basis to them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankine.anatomy import Anatomy, Target, Weight, weight_targets
from rankine.errors import UserError
from rankine.method import Card, Compressor, Evidence, Stream, method
from rankine.metric import Gram, Metric
from rankine.statistics import InputMoment, Need


@method
@dataclass(frozen=True)
class BasisSharing(Compressor):
    """One basis for the same weight of neighbouring blocks.

    - `group`: number of blocks that share.
    - `share`: roles that do; the paper's GPT-2 shares o as well.
    - `update`: fit to what the layers read behind the compressed ones before them.
    """

    card = Card(
        name="basis_sharing",
        title="Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression",
        reference="arXiv:2410.03765",
        authors="Wang, Jingcun and Chen, Yu-Guang and Lin, Ing-Chao and Li, Bing and "
        "Zhang, Grace Li",
        family="low-rank",
        summary="whitened SVD of the weights of neighbouring blocks, which share one basis",
        needs=("calibration",),
    )

    group: int = 2
    share: tuple[str, ...] = ("q", "k", "v", "qkv", "gate", "up")
    update: bool = False

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UserError(f"expected group of at least 1, found {self.group}")
        object.__setattr__(self, "share", tuple(self.share))

    @property
    def stream(self) -> Stream:
        """The dense model's inputs, or those behind the compressed layers."""
        return "compressed" if self.update else "dense"

    def targets(
        self, anatomy: Anatomy, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> list[Target]:
        """Groups of shared roles, every other weight by itself."""
        groups: dict[tuple[str | int, ...], list[Weight]] = {}
        for target in weight_targets(anatomy, include, exclude):
            weight = target.weights[0]
            shared = weight.role in self.share and weight.block >= 0
            place = (weight.role, weight.shape[1], weight.block // self.group)
            groups.setdefault(place if shared else (weight.path,), []).append(weight)
        return [Target(tuple(g), "group" if len(g) > 1 else "weight") for g in groups.values()]

    def needs(self, target: Target) -> frozenset[Need]:
        """The second moment of what each weight reads."""
        return frozenset({InputMoment()})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """Whitening by the mean over all positions of all layers of the group."""
        moments = [evidence.inputs(weight) for weight in target.weights]
        total = torch.stack([m.h_nn * m.count for m in moments]).sum(0)
        return Metric(inputs=Gram(total / sum(m.count for m in moments)))
