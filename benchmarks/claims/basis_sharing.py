"""Basis sharing (2410.03765): at equal stored bits one basis for neighbouring layers beats one for
each (SVD-LLM, which is a group of one); not so for o and down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims.harness import Lab, LanguageScore, Row
from rankine.anatomy import describe
from rankine.checkpoint import open_model
from rankine.metric import Gram, Metric
from rankine.statistics import InputMoment, Walk, survey
from rankine.structures import LowRank
from rankine.tasks import LanguageModelling

TITLE = "basis_sharing: one basis for the same weight of neighbouring blocks"
ROLES = ("q", "k", "v", "gate", "up", "o", "down")
#: Other choices than the paper's pairs of q, k, v, gate and up.
CHOICES: dict[str, dict[str, Any]] = {
    "q, k and v alone share": {"share": ("q", "k", "v")},
    "gate and up alone share": {"share": ("gate", "up")},
    "o and down share, too": {"share": ("q", "k", "v", "o", "gate", "up", "down")},
    "groups of three blocks": {"group": 3},
    "fitted to the inputs of the compressed model": {"update": True},
}


def claims(lab: Lab) -> list[Row]:
    """The paper's comparison at its sizes (20 to 50 % removed), then its choices one by one."""
    rows = [_shared(lab, keep) for keep in ((0.8, 0.7, 0.6, 0.5) if lab.full else (0.8, 0.5))]
    rows += [_choice(lab, 0.5, name, knobs) for name, knobs in CHOICES.items()]
    return [*rows, *(_calibrated(lab, keep) for keep in (0.8, 0.5))]


def _shared(lab: Lab, keep: float) -> Row:
    """Falsified where svd_llm, with as many bits, is as good in any seed."""
    alone = {s: lab.arm("svd_llm", keep, s) for s in lab.seeds}
    ours = {s: lab.arm("basis_sharing", keep, s) for s in lab.seeds}
    found = [lab.gap_ratio(ours[s], alone[s]) for s in lab.seeds]
    return Row(
        "basis_sharing",
        "lower held-out perplexity than svd_llm at equal stored bits, every seed, 95 % intervals "
        "apart",
        f"keep {keep}",
        "svd_llm",
        _mean(alone),
        _mean(ours),
        "perplexity",
        all(lab.difference(ours[s], alone[s]).high < 0 for s in lab.seeds),
        seeds=lab.seeds,
        note=f"gap to dense {np.mean([one.estimate for one in found]):.3f} of svd_llm's",
    )


def _choice(lab: Lab, keep: float, name: str, knobs: Mapping[str, Any]) -> Row:
    """Below one, sharing would be worth it that way."""
    seeds = lab.seeds if lab.full else lab.seeds[:1]
    ours = {s: lab.arm("basis_sharing", keep, s, **knobs) for s in seeds}
    found = [lab.gap_ratio(ours[s], lab.arm("svd_llm", keep, s)) for s in seeds]
    return Row(
        "basis_sharing",
        f"{name}: log-perplexity gap to dense, share of svd_llm's",
        f"keep {keep}",
        "svd_llm",
        1.0,
        float(np.mean([one.estimate for one in found])),
        "ratio of gaps",
        all(one.high < 1.0 for one in found),
        (min(one.low for one in found), max(one.high for one in found)),
        rule="report",
        seeds=seeds,
    )


def _calibrated(lab: Lab, keep: float) -> Row:
    """Where the gain comes from, and where it is lost: errors of the outputs, by role."""
    found = lab.figures(
        {"figures": "errors of pairs", "keep": keep}, lambda: _errors_of_pairs(lab, keep)
    )
    ratio = dict(zip(ROLES, found, strict=True))
    shared = [ratio[role] for role in ("q", "k", "v", "gate", "up")]
    return Row(
        "basis_sharing",
        "error of calibrated outputs of pairs that share, share of that of layers alone: mean over "
        "q, k, v, gate, up",
        f"keep {keep}",
        "svd_llm",
        1.0,
        float(np.mean(shared)),
        "ratio of errors",
        max(shared) < 1.0,
        rule="report",
        note=", ".join(f"{role} {ratio[role]:.2f}" for role in ROLES),
        seeds=(0,),
    )


def _errors_of_pairs(lab: Lab, keep: float) -> list[float]:
    """For each role the mean over pairs of neighbours."""
    model, tokenizer, _ = open_model(lab.model, "cpu", "auto")
    model, anatomy = model.float(), describe(model)
    task = LanguageModelling(tokenizer, sequences=8, length=512, seed=0)
    walk, spool = Walk(model, anatomy, task, list(task.batches("calibration"))), {}
    needs = {w.path: frozenset({InputMoment()}) for w in anatomy.linears}
    moments = survey(walk, needs, spool.get, spool.__setitem__)
    found = []
    for role in ROLES:
        weights = [w for w in anatomy.linears if w.role == role]
        w_oi = [model.get_submodule(w.path).weight.detach().double() for w in weights]
        h_ii = [moments.inputs(w).h_nn for w in weights]
        pairs = range(0, len(weights) - 1, 2)
        found.append(np.mean([_ratio(w_oi[n : n + 2], h_ii[n : n + 2], keep) for n in pairs]))
    return [float(ratio) for ratio in found]


def _ratio(w_oi: list[Tensor], h_ii: list[Tensor], keep: float) -> float:
    """Errors of one basis for both, measured on what each reads, over those of a basis each."""
    o, i = w_oi[0].shape
    alone = [_cut(w, h, int(keep * o * i / (o + i))) for w, h in zip(w_oi, h_ii, strict=True)]
    stack_oi = torch.cat(w_oi)
    together = _cut(stack_oi, sum(h_ii) / 2, int(keep * 2 * o * i / (2 * o + i))).split(o)
    errors = [
        sum(float(((w - a) @ h * (w - a)).sum()) for w, a, h in zip(w_oi, one, h_ii, strict=True))
        for one in (together, alone)
    ]
    return errors[0] / errors[1]


def _cut(w_oi: Tensor, h_ii: Tensor, rank: int) -> Tensor:
    choice = LowRank(rank)
    return choice.decode(choice.encode(w_oi, Metric(inputs=Gram(h_ii))))


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
