"""LORD (2309.14021): output PCA beats plain SVD and centring does not hurt; and one language's
calibration is best for that language."""

from __future__ import annotations

import numpy as np

from benchmarks.claims.harness import SEEDS, Lab, Row

TITLE = "lord: PCA of layer outputs, ranks by layer type"


def claims(lab: Lab) -> list[Row]:
    """Claim 1 of the specification; claim 2 needs English text (`--data`)."""
    rows = []
    for keep in (0.9, 0.8, 0.7, 0.5) if lab.full else (0.7, 0.5):
        svd = lab.arm("svd", keep)
        uncentred = {
            s: lab.arm("lord", keep, s, allocation="uniform", centred=False) for s in SEEDS
        }
        centred = {s: lab.arm("lord", keep, s, allocation="uniform") for s in SEEDS}
        better = [lab.difference(uncentred[s], svd).high < 0 for s in SEEDS]
        rows.append(
            Row(
                "lord",
                "output PCA has lower held-out perplexity than weight SVD, every seed",
                f"keep {keep}",
                "svd",
                svd.perplexity,
                float(np.mean([uncentred[s].perplexity for s in SEEDS])),
                "perplexity",
                all(better),
            )
        )
        harm = [centred[s].perplexity / uncentred[s].perplexity - 1 for s in SEEDS]
        rows.append(
            Row(
                "lord",
                "centring never raises perplexity by more than 0.5 % (its bias counted)",
                f"keep {keep}",
                "uncentred",
                float(np.mean([uncentred[s].perplexity for s in SEEDS])),
                float(np.mean([centred[s].perplexity for s in SEEDS])),
                "perplexity",
                max(harm) <= 0.005,
            )
        )
    if not lab.full:  # the sweep probes every layer type at every share: minutes by itself
        return rows
    keep = 0.6
    swept, uniform = lab.arm("lord", keep), lab.arm("lord", keep, allocation="uniform")
    found = lab.gap_ratio(swept, uniform)
    rows.append(
        Row(
            "lord",
            "one share per layer type by the sweep against the same share everywhere",
            f"keep {keep}",
            "lord, uniform",
            1.0,
            found.estimate,
            "ratio of gaps",
            found.estimate < 1.0,
            (found.low, found.high),
            rule="report",
            seeds=(0,),
        )
    )
    return rows
