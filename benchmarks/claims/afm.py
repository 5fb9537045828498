"""AFM (2405.18146), as far as a language model can show it: output PCA beats weight SVD before any
training and does not lose after it, and a table's rows count by how often they are looked up. The
specification's own size is a click-through model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.claims.harness import SEEDS, Lab, LanguageScore, Row

TITLE = "afm: PCA of the outputs of layers, and of embeddings by their lookups"
#: Of the embedded model: its output layer shares the table.
TABLE = ("model.embed_tokens",)
#: Without a teacher: both arms learn from the text alone.
HEAL = {"kl_weight": 0.0, "lr": 1e-3}


def claims(lab: Lab) -> list[Row]:
    """The statements of claim 1 for linear layers, and claim 2 on the token embedding."""
    seeds = (0, 1, 2, 3, 4) if lab.full else SEEDS
    rows = [_untrained(lab, keep, seeds) for keep in ((0.7, 0.5, 0.35) if lab.full else (0.5,))]
    rows += [_trained(lab, 0.5, seeds), _function(lab, 0.5, seeds)]
    return [*rows, *(_table(lab, keep, seeds) for keep in ((0.7, 0.5) if lab.full else (0.5,)))]


def _untrained(lab: Lab, keep: float, seeds: tuple[int, ...]) -> Row:
    """Falsified if the statistics are wrong."""
    svd = lab.arm("svd", keep)
    ours = {s: lab.arm("afm", keep, s) for s in seeds}
    return Row(
        "afm",
        "before training, lower held-out perplexity than svd of the weights, every seed",
        f"keep {keep}",
        "svd",
        svd.perplexity,
        _mean(ours),
        "perplexity",
        all(lab.difference(a, svd).high < 0 for a in ours.values()),
        seeds=seeds,
    )


def _trained(lab: Lab, keep: float, seeds: tuple[int, ...]) -> Row:
    tuned = _tuned(lab, keep)
    svd, ours = ({s: tuned(name, seed=s) for s in seeds} for name in ("svd", "afm"))
    return Row(
        "afm",
        "after equal training, on average not above svd",
        f"keep {keep}",
        "svd, trained",
        _mean(svd),
        _mean(ours),
        "perplexity",
        _mean(ours) <= _mean(svd),
        note=_steps(lab),
        seeds=seeds,
    )


def _function(lab: Lab, keep: float, seeds: tuple[int, ...]) -> Row:
    """The paper recommends it for layers with a function of their own behind them; a transformer's
    projections have none."""
    tuned = _tuned(lab, keep)
    plain = {s: tuned("afm", seed=s) for s in seeds}
    ours = {s: tuned("afm", seed=s, act="relu", headroom=3.0) for s in seeds}
    return Row(
        "afm",
        "a relu between the factors, lifted three deviations, after equal training",
        f"keep {keep}",
        "afm, trained",
        _mean(plain),
        _mean(ours),
        "perplexity",
        _mean(ours) <= _mean(plain),
        rule="report",
        note=_steps(lab),
        seeds=seeds,
    )


def _table(lab: Lab, keep: float, seeds: tuple[int, ...]) -> Row:
    """The output layer reads the same table and weighs rows otherwise: reported, not asserted."""
    svd = lab.arm("svd", keep, include=TABLE)
    ours = {s: lab.arm("afm", keep, s, include=TABLE) for s in seeds}
    return Row(
        "afm",
        "the token embedding alone: rows weighted by lookups against rows that count alike",
        f"keep {keep} of the table",
        "svd",
        svd.perplexity,
        _mean(ours),
        "perplexity",
        all(lab.difference(a, svd).high < 0 for a in ours.values()),
        rule="report",
        note="the output layer shares the table, so its rows also weigh by what is predicted",
        seeds=seeds,
    )


def _tuned(lab: Lab, keep: float) -> partial[LanguageScore]:
    return partial(lab.arm, keep=keep, heal={**HEAL, **_schedule(lab)})


def _schedule(lab: Lab) -> Mapping[str, Any]:
    return {"steps": 200, "batch": 4} if lab.full else {"steps": 40, "batch": 2}


def _steps(lab: Lab) -> str:
    steps = _schedule(lab)
    return f"{steps['steps']} steps of {steps['batch']} x 1024 tokens"


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
