"""ASVD (2312.05821): the size of the inputs helps plain SVD, their covariance helps more; and what
its search of ranks is worth."""

from __future__ import annotations

import numpy as np

from benchmarks.claims.harness import Lab, Row

TITLE = "asvd: SVD scaled by the size of the inputs, ranks by probing each layer"
UNIFORM = {"allocation": "uniform"}


def claims(lab: Lab) -> list[Row]:
    """The order of methods at equal stored bits (peers' page), then the search."""
    rows = []
    for keep in (0.7, 0.5, 0.35, 0.25) if lab.full else (0.5,):
        svd = lab.arm("svd", keep)
        ours = {s: lab.arm("asvd", keep, s, **UNIFORM) for s in lab.seeds}
        whitened = {s: lab.arm("svd_llm", keep, s) for s in lab.seeds}
        better = [lab.difference(ours[s], svd).high < 0 for s in lab.seeds]
        behind = [lab.difference(whitened[s], ours[s]).high < 0 for s in lab.seeds]
        mean = float(np.mean([score.perplexity for score in ours.values()]))
        of_whitened = float(np.mean([score.perplexity for score in whitened.values()]))
        rows.append(
            Row(
                "asvd",
                "uniform ranks: lower held-out perplexity than svd, every seed, 95 % intervals "
                "apart",
                f"keep {keep}",
                "svd",
                svd.perplexity,
                mean,
                "perplexity",
                all(better),
                seeds=lab.seeds,
            )
        )
        rows.append(
            Row(
                "asvd",
                "uniform ranks: higher held-out perplexity than svd_llm, every seed, 95 % "
                "intervals apart",
                f"keep {keep}",
                "svd_llm",
                of_whitened,
                mean,
                "perplexity",
                all(behind),
                rule="report",
                seeds=lab.seeds,
            )
        )
    if not lab.full:  # the search probes nine sizes of every layer: minutes by itself
        return rows
    return [*rows, *_exponents(lab, 0.5), _search(lab, 0.8)]


def _exponents(lab: Lab, keep: float) -> list[Row]:
    """The paper's choice of α against full scaling."""
    half, whole = lab.arm("asvd", keep, **UNIFORM), lab.arm("asvd", keep, alpha=1.0, **UNIFORM)
    return [
        Row(
            "asvd",
            "α = 0.5 has lower held-out perplexity than α = 1",
            f"keep {keep}",
            "asvd, α = 1",
            whole.perplexity,
            half.perplexity,
            "perplexity",
            lab.difference(half, whole).high < 0,
            rule="report",
            seeds=(0,),
        )
    ]


def _search(lab: Lab, keep: float) -> Row:
    searched, uniform = lab.arm("asvd", keep), lab.arm("asvd", keep, **UNIFORM)
    found = lab.gap_ratio(searched, uniform)
    return Row(
        "asvd",
        "ranks by its search against the same share everywhere",
        f"keep {keep}",
        "asvd, uniform",
        1.0,
        found.estimate,
        "ratio of gaps",
        found.high < 1.0,
        (found.low, found.high),
        rule="report",
        seeds=(0,),
    )
