"""AFM (2405.18146): on a click-through model, output PCA beats weight SVD before any training and
does not lose after it, and a table's rows count by how often they are looked up; the same on a
language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims import clicks
from benchmarks.claims.harness import Lab, LanguageScore, Row, digest
from rankine.pipeline import compress

TITLE = "afm: PCA of the outputs of layers, and of embeddings by their lookups"
#: Of the embedded model: its output layer shares the table.
TABLE = ("model.embed_tokens",)
#: Without a teacher: both arms learn from the text alone.
HEAL = {"kl_weight": 0.0, "lr": 1e-3, "steps": 200, "batch": 4}
STEPS = "200 steps of 4 x 1024 tokens"
#: Share of the click model's tables and middle layers that is kept: rank 64 of 400 x 400.
SHARE = 0.32
#: By how much of the AUC the mean may be below svd's and the dense model's.
BELOW_SVD, BELOW_DENSE = 0.0005, 0.002


def claims(lab: Lab) -> list[Row]:
    """Both claims on clicks, then what a language model shows of them."""
    seeds = (0, 1, 2, 3, 4) if lab.full else lab.seeds
    rows = [_untrained(lab, keep, seeds) for keep in ((0.7, 0.5, 0.35) if lab.full else (0.5,))]
    if lab.full:
        rows += [_trained(lab, 0.5, seeds), _function(lab, 0.5, seeds)]
    rows += [_table(lab, keep, seeds) for keep in ((0.7, 0.5) if lab.full else (0.5,))]
    return [*_clicks(lab), *rows]


# -- clicks --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """Of the click model's part: rows, epochs of the dense model, batches for the statistics."""

    rows: int
    epochs: int
    calibration: int


def _clicks(lab: Lab) -> list[Row]:
    """The specification's generator and rows; dense and the small architecture get the extra epoch,
    too. With a fifth of the rows the dense model knows them by heart more than it generalizes, and
    what a look-up is worth says little of the loss: reported."""
    size, few = Size(400_000, 2, 64), Size(80_000, 2, 32)
    seeds = (0, 1, 2, 3, 4) if lab.full else lab.seeds
    found, by_heart = ([_measured(lab, one, s) for s in seeds] for one in (size, few))
    return [
        _lower(size, seeds, found, "", "loss"),
        _lower(size, seeds, found, "the tables alone: ", "tables"),
        *_areas(size, seeds, found),
        _lower(few, seeds, by_heart, "a fifth of the rows: ", "loss", rule="report"),
    ]


def _row(size: Size, seeds: tuple[int, ...]) -> partial[Row]:
    """What its rows have in common."""
    data = f"generated clicks, {size.rows:,} rows, a tenth for the test"
    budget = f"{SHARE:.0%} of tables and middle layers"
    return partial(Row, "afm", budget=budget, seeds=seeds, on=clicks.NAME, data=data)


def _lower(
    size: Size,
    seeds: tuple[int, ...],
    found: list[dict[str, float]],
    what: str,
    key: str,
    rule: str = "assert",
) -> Row:
    """Falsified if the statistics are wrong."""
    gaps = [one[f"afm {key}"] - one[f"svd {key}"] for one in found]
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    return _row(size, seeds)(
        claim=f"{what}before training, lower logloss than svd, every seed",
        baseline="svd",
        baseline_value=mean[f"svd {key}"],
        value=mean[f"afm {key}"],
        unit="logloss",
        holds=max(gaps) < 0,
        rule=rule,
        note=f"dense {mean['dense loss']:.4f}; gaps {min(gaps):+.4f} to {max(gaps):+.4f}",
    )


def _areas(size: Size, seeds: tuple[int, ...], found: list[dict[str, float]]) -> list[Row]:
    names = ("svd", "afm", "dense", "scratch")
    auc = {name: float(np.mean([one[f"{name} tuned"] for one in found])) for name in names}
    worse = min("svd", "afm", key=lambda name: auc[name])
    limits = {"svd": BELOW_SVD, "dense": BELOW_DENSE}
    rows = [
        _row(size, seeds)(
            claim=f"after an epoch of training, mean AUC not below {name}'s by more than {limit}",
            baseline=f"{name}, trained",
            baseline_value=auc[name],
            value=auc["afm"],
            unit="AUC",
            holds=auc["afm"] >= auc[name] - limit,
        )
        for name, limit in limits.items()
    ]
    last = _row(size, seeds)(
        claim="after an epoch of training, neither svd nor afm below the same architecture trained "
        "from scratch for as many epochs",
        baseline="from scratch",
        baseline_value=auc["scratch"],
        value=auc[worse],
        unit="AUC",
        holds=auc[worse] >= auc["scratch"],
        note=worse,
    )
    return [*rows, last]


def _measured(lab: Lab, size: Size, seed: int) -> dict[str, float]:
    """Test loglosses before training, AUCs after it."""
    tables = ("tables.*",)
    layers = (*tables, "second", "third")

    def run() -> list[float]:
        data = clicks.clicks(size.rows, seed)
        dense = clicks.trained(data, seed, size.epochs)

        def cut(method: str, include: tuple[str, ...]) -> Any:
            return compress(
                copy.deepcopy(dense),
                method=method,
                bits=SHARE * 32,
                include=include,
                seed=seed,
                task=data.task(size.calibration),
                evaluate=False,
            )

        def tuned(
            model: Any, patch: Any, epochs: int = 1, rate: float = clicks.TUNING_RATE
        ) -> float:
            clicks.tune(model, data, patch, seed, epochs, rate)
            return clicks.scores(model, data)[1]

        svd, afm = cut("svd", layers), cut("afm", layers)
        small = clicks.forgotten(copy.deepcopy(svd.model), seed)
        return [
            clicks.scores(dense, data)[0],
            *(clicks.scores(one.model, data)[0] for one in (svd, afm)),
            *(clicks.scores(cut(name, tables).model, data)[0] for name in ("svd", "afm")),
            *(tuned(one.model, one.patch) for one in (svd, afm)),
            tuned(dense, type(svd.patch)()),
            tuned(small, svd.patch, size.epochs + 1, clicks.RATE),
        ]

    names = ("dense loss", "svd loss", "afm loss", "svd tables", "afm tables")
    names += ("svd tuned", "afm tuned", "dense tuned", "scratch tuned")
    key = {"figures": "clicks", "seed": seed, **asdict(size), "share": SHARE}
    found = lab.figures({**key, "made by": digest(Path(clicks.__file__))}, run)
    return dict(zip(names, found, strict=True))


# -- a language model ----------------------------------------------------------------------------
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
        note=STEPS,
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
        note=STEPS,
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
    return partial(lab.arm, keep=keep, heal=HEAL)


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
