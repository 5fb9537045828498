"""Basis sharing (2410.03765): at equal stored bits one basis for neighbouring layers beats one for
each (SVD-LLM, which is a group of one); not so for o and down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.claims.harness import SEEDS, Lab, LanguageScore, Row

TITLE = "basis_sharing: one basis for the same weight of neighbouring blocks"
#: The paper's roles, and those that it found to lose by sharing.
SHARED, ALL = ("q", "k", "v", "gate", "up"), ("q", "k", "v", "o", "gate", "up", "down")


def claims(lab: Lab) -> list[Row]:
    """The paper's comparison at its sizes (20 to 50 % removed), then its choices one by one."""
    rows = [_shared(lab, keep) for keep in ((0.8, 0.7, 0.6, 0.5) if lab.full else (0.6, 0.5))]
    keep = 0.5
    pair = {s: lab.arm("basis_sharing", keep, s) for s in SEEDS}
    options: dict[str, tuple[dict[str, Any], str]] = {
        "o and down share, too": ({"share": ALL}, "what the paper advises against"),
        "groups of three blocks": ({"group": 3}, ""),
        "fitted to the inputs of the compressed model": ({"update": True}, "the paper: from 40 %"),
        "gate and up alone share": ({"share": ("gate", "up")}, ""),
        "q, k and v alone share": ({"share": ("q", "k", "v")}, ""),
    }
    for name, (knobs, note) in options.items():
        if lab.full or name in list(options)[:3]:
            rows.append(_option(lab, keep, name, knobs, note, pair))
    return rows


def _shared(lab: Lab, keep: float) -> Row:
    """Falsified where svd_llm, with as many bits, is as good in any seed."""
    alone = {s: lab.arm("svd_llm", keep, s) for s in SEEDS}
    ours = {s: lab.arm("basis_sharing", keep, s) for s in SEEDS}
    found = [lab.gap_ratio(ours[s], alone[s]) for s in SEEDS]
    return Row(
        "basis_sharing",
        "lower held-out perplexity than svd_llm at equal stored bits, every seed, 95 % intervals "
        "apart",
        f"keep {keep}",
        "svd_llm",
        _mean(alone),
        _mean(ours),
        "perplexity",
        all(lab.difference(ours[s], alone[s]).high < 0 for s in SEEDS),
        note=f"gap to dense {np.mean([one.estimate for one in found]):.3f} of svd_llm's",
    )


def _option(
    lab: Lab,
    keep: float,
    name: str,
    knobs: Mapping[str, Any],
    note: str,
    pair: Mapping[int, LanguageScore],
) -> Row:
    """Against the paper's own choice: pairs of q, k, v, gate and up, fitted to the dense model."""
    seeds = SEEDS if lab.full else SEEDS[:1]
    other = {s: lab.arm("basis_sharing", keep, s, **knobs) for s in seeds}
    found = [lab.gap_ratio(other[s], pair[s]) for s in seeds]
    return Row(
        "basis_sharing",
        f"{name}: log-perplexity gap to dense, share of that of pairs that share q, k, v, gate, up",
        f"keep {keep}",
        "pairs",
        1.0,
        float(np.mean([one.estimate for one in found])),
        "ratio of gaps",
        all(one.high < 1.0 for one in found),
        (min(one.low for one in found), max(one.high for one in found)),
        rule="report",
        note=note,
        seeds=seeds,
    )


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
