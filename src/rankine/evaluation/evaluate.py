"""One model, or two on the same text: the figures of the report's table, for any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rankine import own
from rankine.acceptance import Condition, check_measured, unmet
from rankine.checkpoint import directory_bytes, is_plain, open_given
from rankine.errors import AcceptanceError, UserError
from rankine.evaluation.latency import Latency, measure_latency, parameter_bytes
from rankine.evaluation.perplexity import Interval, paired_bootstrap, perplexity
from rankine.limits import allowing_pickles
from rankine.progress import concerning
from rankine.tasks.score import LanguageScore
from rankine.tasks.task import own_figures


def evaluate(
    model: str | nn.Module,
    *,
    against: str | nn.Module | None = None,
    into: Any = None,
    evaluate: Any = None,
    accept: Sequence[str] | str = (),
    evaluation: str = "embedded",
    eval_tokens: int = 50_000,
    text_column: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    fused: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Perplexity, bits per byte and accuracy on held-out text, bytes, and decoding speed of
    language models; of any model the user's own figures.

    `model` and `against` are hub ids, directories, "embedded", modules or the names of what builds
    them ("package.module:factory"); `into` is the factory (or its name) of the architecture that
    directories of plain modules go into. `evaluate(model)` (or its name) gives figures by name;
    without it, each model must be a language model with its tokenizer. `accept` holds conditions
    on the figures of `model`, such as "auc>=0.80".

    Returns {"rows": the report's rows, `against` first, "difference": (estimate, low, high) of the
    log-perplexity of `model` minus that of `against` with its paired 95 % interval, or None where
    there is no second model or the two cut the text into other tokens}. On a CPU 16-bit weights
    are computed in float32; with `fused` decoding is timed inside `rankine.fused`; with
    `allow_pickle` weights in pickles are read, their tensors and no code. Raises UserError, and its
    kind AcceptanceError (with the figures as its report).
    """
    texts = (accept,) if isinstance(accept, str) else accept
    conditions = [Condition.parse(text) for text in texts]
    metrics = None if isinstance(evaluate, bool) else own.function(evaluate, "evaluate")
    given = [against, model] if against is not None else [model]
    places = [into if one is model or is_plain(one) else None for one in given]
    with allowing_pickles(allow_pickle):
        opened = [_open(one, into, device, dtype) for one, into in zip(given, places, strict=True)]
    text = {"text": evaluation, "max_tokens": max(eval_tokens, 2), "column": text_column}
    scores = [_score(entry, text, metrics is not None) for entry in opened]
    speaking = {e.name: e.module for e, score in zip(opened, scores, strict=True) if score}
    latencies = measure_latency(speaking, fused=fused) if speaking else {}
    known = [score for score in scores if score is not None]
    rows = []
    for entry, score in zip(opened, scores, strict=True):
        row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "bytes": entry.bytes}
        if score is not None:
            row |= _speed(latencies[entry.name], beside=len(known) > 1) | score.summary()
        if metrics is not None:
            with concerning(entry.name):
                row["metrics"] = own_figures(metrics, entry.module)
        rows.append(row)
    found = {"rows": rows, "difference": _difference(known)}
    check_measured(conditions, rows[-1])
    if failed := unmet(conditions, rows):
        raise AcceptanceError(failed, found)
    return found


class _Opened(NamedTuple):
    """A model to be measured, the kind of its row, its bytes on disk."""

    name: str
    module: nn.Module
    tokenizer: Any
    kind: str
    bytes: int


def _open(model: str | nn.Module, into: Any, device: str | torch.device, dtype: str) -> _Opened:
    module, tokenizer, info = open_given(model, into, device, dtype)
    directory: Path | None = info.directory
    size = directory_bytes(directory)[0] if directory else parameter_bytes(module)
    if torch.device(device).type == "cpu" and isinstance(model, str):
        module = module.to(torch.float32)
    return _Opened(info.spec, module, tokenizer, "result" if info.patch else "dense", size)


def _score(entry: _Opened, text: dict[str, Any], measured: bool) -> LanguageScore | None:
    """Of a language model with its tokenizer; of others only the user's figures are known."""
    if entry.tokenizer is not None:
        with concerning(entry.name):
            return perplexity(entry.module, entry.tokenizer, **text)
    if measured:
        return None
    raise UserError(
        f"expected a tokenizer beside the model {entry.name}, or figures of your own, found "
        "neither: save one there, or pass evaluate= (--evaluate package.module:metrics)"
    )


def _speed(latency: Latency, beside: bool) -> dict[str, float | None]:
    """`beside`: was another model timed, which this one's ratio is against?"""
    ratio = latency.speedup if beside else None
    return {"tokens_per_second": latency.tokens_per_second, "ratio_to_dense": ratio}


def _difference(scores: list[LanguageScore]) -> Interval | None:
    if len(scores) < 2 or not np.array_equal(scores[0].counts, scores[1].counts):
        return None
    return paired_bootstrap(scores[1], scores[0])
