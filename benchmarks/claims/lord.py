"""LORD (2309.14021): output PCA beats plain SVD and ASVD; centring does not hurt; calibration on
one language is best for that language."""

from __future__ import annotations

import json
import lzma
import pydoc_data.topics
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.claims.harness import CACHE, Lab, LanguageScore, Row

TITLE = "lord: PCA of layer outputs, ranks by layer type"
UNIFORM = {"allocation": "uniform"}
#: What is left of svd's log-perplexity gap to dense, at most, by keep.
EXCESS = {0.5: 0.75, 0.35: 0.5}
#: Centring may raise the perplexity by this share.
HARM = 0.005
#: Articles of Wikipedia that calibration draws from.
ARTICLES = 1500


def claims(lab: Lab) -> list[Row]:
    """Both claims of the specification."""
    rows = []
    for keep in (0.9, 0.8, 0.7, 0.5, 0.35) if lab.full else (0.7, 0.5):
        plain = {s: lab.arm("lord", keep, s, centred=False, **UNIFORM) for s in lab.seeds}
        rows += [_better(lab, keep, plain), _centred(lab, keep, plain)]
        rows += [_excess(lab, keep, plain)] if keep in EXCESS else []
    rows += [_monolingual(lab, 0.7)]
    return [*rows, *([_sweep(lab, 0.6)] if lab.full else [])]


def _better(lab: Lab, keep: float, ours: Mapping[int, LanguageScore]) -> Row:
    svd = lab.arm("svd", keep)
    asvd = {s: lab.arm("asvd", keep, s, **UNIFORM) for s in lab.seeds}
    lower = [lab.difference(ours[s], other).high < 0 for s in ours for other in (svd, asvd[s])]
    return Row(
        "lord",
        "output PCA has lower held-out perplexity than weight SVD and than ASVD, every seed, 95 % "
        "intervals apart",
        f"keep {keep}",
        "svd",
        svd.perplexity,
        _mean(ours),
        "perplexity",
        all(lower),
        note=f"asvd {_mean(asvd):.3f}",
        seeds=lab.seeds,
    )


def _centred(lab: Lab, keep: float, plain: Mapping[int, LanguageScore]) -> Row:
    centred = {s: lab.arm("lord", keep, s, **UNIFORM) for s in lab.seeds}
    harm = [centred[s].perplexity / plain[s].perplexity - 1 for s in lab.seeds]
    return Row(
        "lord",
        "centring never raises perplexity by more than 0.5 % (its bias counted)",
        f"keep {keep}",
        "uncentred",
        _mean(plain),
        _mean(centred),
        "perplexity",
        max(harm) <= HARM,
        seeds=lab.seeds,
    )


def _excess(lab: Lab, keep: float, ours: Mapping[int, LanguageScore]) -> Row:
    """The widest of the seeds' intervals."""
    svd = lab.arm("svd", keep)
    found = [lab.gap_ratio(score, svd) for score in ours.values()]
    return Row(
        "lord",
        f"log-perplexity gap to dense, share of svd's: at most {EXCESS[keep]}",
        f"keep {keep}",
        "svd",
        1.0,
        float(np.mean([one.estimate for one in found])),
        "ratio of gaps",
        all(one.estimate <= EXCESS[keep] for one in found),
        (min(one.low for one in found), max(one.high for one in found)),
        seeds=lab.seeds,
    )


def _monolingual(lab: Lab, keep: float) -> Row:
    """As many tokens of English: Wikipedia, or, without `--data`, the documentation of Python."""
    seeds = (0, 1, 2, 3, 4) if lab.full else lab.seeds
    name, text = _english(lab)
    python = {s: lab.arm("lord", keep, s, **UNIFORM) for s in seeds}
    english = {s: lab.arm("lord", keep, s, calibration=text, **UNIFORM) for s in seeds}
    return Row(
        "lord",
        f"calibrated on Python, lower perplexity of Python than calibrated on English ({name}), "
        "every seed, 95 % intervals apart",
        f"keep {keep}",
        "English",
        _mean(english),
        _mean(python),
        "perplexity",
        all(lab.difference(python[s], english[s]).high < 0 for s in seeds),
        seeds=seeds,
        given=lab.data is not None,
    )


def _english(lab: Lab) -> tuple[str, Path]:
    """What it is, and a text file of it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if lab.data is None:
        name, texts = "documentation of Python", list(pydoc_data.topics.topics.values())
    else:
        with lzma.open(lab.data / "text" / "wikipedia_en" / "train.jsonl.xz", "rt") as lines:
            name, texts = "Wikipedia", [json.loads(x)["text"] for x in islice(lines, ARTICLES)]
    file = CACHE / f"{name.replace(' ', '_')}.txt"
    file.write_text("\n\n".join(texts), "utf-8")
    return name, file


def _sweep(lab: Lab, keep: float) -> Row:
    """It probes every layer type at every share: minutes by itself."""
    found = lab.gap_ratio(lab.arm("lord", keep), lab.arm("lord", keep, **UNIFORM))
    return Row(
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


def _mean(arms: Mapping[int, LanguageScore]) -> float:
    return float(np.mean([score.perplexity for score in arms.values()]))
