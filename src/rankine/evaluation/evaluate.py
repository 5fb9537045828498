"""One model, or two on the same text: the figures of the report's table, for any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankine.checkpoint import directory_bytes, open_model
from rankine.errors import UserError
from rankine.evaluation.latency import measure_latency, parameter_bytes
from rankine.evaluation.perplexity import Interval, paired_bootstrap, perplexity
from rankine.tasks.score import LanguageScore


def evaluate(
    model: str,
    *,
    against: str | None = None,
    evaluation: str = "embedded",
    eval_tokens: int = 50_000,
    text_column: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    fused: bool = False,
) -> dict[str, Any]:
    """Perplexity, bits per byte and accuracy on held-out text, bytes, and decoding speed.

    `model` and `against` are hub ids, directories or "embedded". Returns {"rows": the report's
    rows, `against` first, "difference": (estimate, low, high) of the log-perplexity of `model`
    minus that of `against` with its paired 95 % interval, or None where there is no second model
    or the two cut the text into other tokens}. On a CPU 16-bit weights are computed in float32;
    with `fused` decoding is timed inside `rankine.fused`.
    Raises UserError.
    """
    names = [against, model] if against is not None else [model]
    opened = {name: _open(name, device, dtype) for name in names}
    scores = {
        name: perplexity(
            module, tokenizer, evaluation, max_tokens=max(eval_tokens, 2), column=text_column
        )
        for name, (module, tokenizer, _, _) in opened.items()
    }
    models = {name: entry[0] for name, entry in opened.items()}
    latencies = measure_latency(models, fused=fused)
    rows = [
        {
            "name": name,
            "kind": kind,
            "bytes": size,
            "tokens_per_second": latencies[name].tokens_per_second,
            "ratio_to_dense": latencies[name].speedup if len(names) > 1 else None,
            **scores[name].summary(),
        }
        for name, (_, _, kind, size) in opened.items()
    ]
    return {"rows": rows, "difference": _difference([scores[name] for name in names])}


def _open(spec: str, device: str | torch.device, dtype: str) -> tuple[nn.Module, Any, str, int]:
    """(module, tokenizer, kind of row, bytes on disk)."""
    module, tokenizer, info = open_model(spec, device, dtype)
    if tokenizer is None:
        raise UserError(f"expected a tokenizer beside the model {spec}, found none: save one there")
    directory: Path | None = info.directory
    size = directory_bytes(directory)[0] if directory else parameter_bytes(module)
    if torch.device(device).type == "cpu":
        module = module.to(torch.float32)
    return module, tokenizer, "result" if info.patch else "dense", size


def _difference(scores: list[LanguageScore]) -> Interval | None:
    if len(scores) < 2 or not np.array_equal(scores[0].counts, scores[1].counts):
        return None
    return paired_bootstrap(scores[1], scores[0])
