"""Windowed perplexity, bits per byte and next-token accuracy, and paired intervals for them.

The protocol of the compression papers: documents concatenated, non-overlapping windows of the
model's context, every token after a window's first is scored. It is not lm-eval's word perplexity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from rankine.errors import UserError
from rankine.tasks import windows as W
from rankine.tasks.language import context_length
from rankine.tasks.score import LanguageScore, score_windows
from rankine.tasks.text import Source, passages

__all__ = ["Interval", "LanguageScore", "gap_ratio", "paired_bootstrap", "perplexity"]


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: Source = "embedded",
    *,
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    tokens_at_once: int = 8192,
    column: str | None = None,
) -> LanguageScore:
    """Score a causal language model on a text source (its evaluation split).

    `window` is clamped to the model's context; `stride` < `window` lets windows overlap, each token
    is then scored once with at least `window − stride` tokens before it. Raises UserError.
    """
    length = min(window, context_length(getattr(model, "config", None)) or window)
    if stride is not None and not 1 <= stride <= length:
        raise UserError(f"expected a stride between 1 and the window of {length}, found {stride}")
    stream = W.take(W.tokenize(passages(text, "evaluation", column), tokenizer), max_tokens)
    windows = W.cut(stream, length, stride)
    if not len(windows):
        raise UserError(f"expected at least two tokens of text, found {len(stream[0])}")
    return score_windows(model, windows, tokens_at_once)


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    a: LanguageScore, b: LanguageScore, *, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Log-perplexity of `a` minus that of `b` on the same windows (negative: `a` is better). A
    single window has no interval: its bounds are NaN."""
    sums = _resampled([a, b], samples, seed)
    if len(a.counts) < 2:
        return Interval(a.loss - b.loss, math.nan, math.nan)
    return _interval(a.loss - b.loss, (sums[0] - sums[1]), level)


def gap_ratio(
    a: LanguageScore,
    b: LanguageScore,
    dense: LanguageScore,
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """(a − dense) / (b − dense) in log-perplexity, on the same windows: what share of b's damage
    a does. NaN where b does none."""
    if b.loss == dense.loss:
        return Interval(math.nan, math.nan, math.nan)
    sums = _resampled([a, b, dense], samples, seed)
    ratios = (sums[0] - sums[2]) / (sums[1] - sums[2])
    return _interval((a.loss - dense.loss) / (b.loss - dense.loss), ratios, level)


def _resampled(scores: list[LanguageScore], samples: int, seed: int) -> np.ndarray:
    """(scores, samples) mean nats per token over windows drawn with replacement, the same draw
    for every score."""
    first = scores[0]
    for other in scores[1:]:
        if not np.array_equal(first.counts, other.counts):
            raise UserError("expected scores of the same windows: evaluate both on the same text")
    n = len(first.counts)
    # How often each window is drawn is all that matters: multinomial counts, one product.
    drawn_sn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), samples)
    tokens_s = drawn_sn @ first.counts
    return np.stack([drawn_sn @ score.nats / tokens_s for score in scores])


def _interval(estimate: float, values: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
