"""How well a language model predicts text: nats, hits and bytes per window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine.progress import counted
from rankine.tasks.task import device_of, evaluating, to_device
from rankine.tasks.windows import Windows

#: Logits turned to float32 at once (64 MB): a large vocabulary is never copied whole.
CHUNK = 1 << 24
#: Draws of the bootstrap.
SAMPLES = 2000


@dataclass(frozen=True)
class LanguageScore:
    """Per window: float64 `nats`, and the int64 `counts` of scored tokens, `hits` (the right token
    was the likeliest) and `bytes` of text those tokens stand for (negative: unknown)."""

    nats: np.ndarray
    counts: np.ndarray
    hits: np.ndarray
    bytes: np.ndarray

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean nats per token: the log of the perplexity."""
        return float(self.nats.sum() / self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(mean nats per token); infinite where that overflows."""
        return _exp(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of the perplexity: windows drawn anew; None for a single one."""
        n = len(self.counts)
        if n < 2:
            return None
        # How often each window is drawn is all that matters: multinomial counts, two products.
        drawn_sn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), SAMPLES)
        low, high = np.quantile(drawn_sn @ self.nats / (drawn_sn @ self.counts), (0.025, 0.975))
        return _exp(float(low)), _exp(float(high))

    @property
    def bits_per_byte(self) -> float:
        """Total nats ÷ ln 2 ÷ bytes of the text scored; NaN for a tokenizer without offsets."""
        total = int(self.bytes.sum())
        return float(self.nats.sum()) / math.log(2) / total if total > 0 else math.nan

    @property
    def accuracy(self) -> float:
        """Share of scored tokens that were the likeliest."""
        return float(self.hits.sum() / self.tokens)

    def summary(self) -> dict[str, Any]:
        """perplexity, perplexity_interval (None for a single window), bits_per_byte, accuracy,
        tokens."""
        return {
            "perplexity": self.perplexity,
            "perplexity_interval": self.perplexity_interval,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "tokens": float(self.tokens),
        }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def logits_of(outputs: Any) -> Tensor:
    """The (b, t, v) logits in what a causal language model returns."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def run_model(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The model on a batch, on its device, without a key-value cache."""
    inputs = to_device(batch, device_of(model))
    if hasattr(getattr(model, "config", None), "use_cache"):
        return model(**inputs, use_cache=False)
    return model(**inputs)


def token_nats(logits_btv: Tensor, ids_bt: Tensor) -> Tensor:
    """(b, t − 1) float32 cross-entropy of each token after the first, differentiable."""
    logits_mv = logits_btv[:, :-1].flatten(0, 1)
    targets_m = ids_bt[:, 1:].flatten().to(logits_mv.device)
    rows = max(1, CHUNK // logits_mv.shape[1])
    nats = [
        F.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits_mv.split(rows), targets_m.split(rows))
    ]
    return torch.cat(nats).view(ids_bt.shape[0], -1)


@torch.no_grad()
def score_windows(model: nn.Module, windows: Windows, tokens_at_once: int = 8192) -> LanguageScore:
    """Score every window; `tokens_at_once` bounds a batch and changes no figure beyond rounding."""
    size = max(1, tokens_at_once // windows.ids_nt.shape[1])
    batches = torch.arange(len(windows)).split(size)
    with evaluating(model):
        parts = [_score_batch(model, windows[rows]) for rows in counted(batches, "score")]
    nats, counts, hits, size_n = torch.cat(parts, 1).numpy()
    return LanguageScore(
        nats, counts.astype(np.int64), hits.astype(np.int64), size_n.astype(np.int64)
    )


def _score_batch(model: nn.Module, part: Windows) -> Tensor:
    """(4, windows) float64: nats, scored tokens, hits, bytes."""
    batch = part.batch()
    ids_bt = batch["input_ids"]
    logits_btv = logits_of(run_model(model, batch))
    scored_bt = part.scored()[:, 1 : ids_bt.shape[1]]
    nats_bt = token_nats(logits_btv, ids_bt).cpu().double()
    hits_bt = logits_btv[:, :-1].argmax(-1).cpu() == ids_bt[:, 1:]
    return torch.stack(
        [
            nats_bt.where(scored_bt, 0.0).sum(1),
            scored_bt.sum(1).double(),
            (hits_bt & scored_bt).sum(1).double(),
            (part.bytes_nt[:, 1 : ids_bt.shape[1]] * scored_bt).sum(1).double(),
        ]
    )
