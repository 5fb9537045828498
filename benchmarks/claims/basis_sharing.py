"""Basis sharing (2410.03765): at equal stored bits one basis for neighbouring layers beats one for
each (SVD-LLM, which is a group of one); not so for o and down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.claims.harness import Lab, LanguageScore, Row

TITLE = "basis_sharing: one basis for the same weight of neighbouring blocks"
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
    choices = [(keep, *choice) for keep in (0.8, 0.5) for choice in CHOICES.items()]
    return [*rows, *(_choice(lab, *choice) for choice in choices)]


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


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
