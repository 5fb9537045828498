"""Tiny seeded models and tasks that several rooms' tests share. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from rankine.tasks import FunctionTask
from rankine.testing.models import COMMON, built, seeded
from rankine.testing.models import VOCABULARY as VOCABULARY
from rankine.testing.models import Tokens as Tokens
from rankine.testing.models import gpt2 as gpt2
from rankine.testing.models import ids as ids
from rankine.testing.models import llama as llama
from rankine.testing.models import tokens as tokens


def qwen2(seed: int = 0, **overrides: Any) -> Any:
    """Biases on q, k and v."""
    fields = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, **overrides}
    return built(tf.AutoModelForCausalLM, tf.Qwen2Config(**fields), seed)


def opt(seed: int = 0, **overrides: Any) -> Any:
    """Learned positions with an offset, ReLU."""
    fields = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **overrides}
    return built(tf.AutoModelForCausalLM, tf.OPTConfig(**fields), seed)


def bert(seed: int = 0, **overrides: Any) -> Any:
    """A bidirectional encoder with a classifier of two classes."""
    fields = {**COMMON, "intermediate_size": 48, **overrides}
    return built(tf.AutoModelForSequenceClassification, tf.BertConfig(**fields), seed)


LANGUAGE = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "opt": opt}


class Mlp(nn.Module):
    """No transformers class and no list of blocks: the generic walk takes it whole."""

    def __init__(self, inputs: int = 12, width: int = 24, outputs: int = 5):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) → (n, outputs)."""
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def mlp(seed: int = 0) -> Mlp:
    """A seeded one."""
    torch.manual_seed(seed)
    return Mlp().eval()


def classified(count: int = 6, length: int = 8, batch: int = 2) -> FunctionTask:
    """Padded sequences with a class each: one loss term per example."""
    x, labels = ids(count, length), torch.randint(0, 2, (count,), generator=seeded(3))
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=seeded(4))
    mask = (torch.arange(length) < lengths).long()
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(x.split(batch), mask.split(batch), labels.split(batch), strict=True)
    ]
    return FunctionTask(
        batches,
        forward=lambda model, b: model(b["input_ids"], attention_mask=b["attention_mask"]),
        loss=lambda out, b: F.cross_entropy(out.logits, b["labels"], reduction="none"),
        evaluation=batches,
        mask=lambda b: b["attention_mask"].bool(),
    )


def regression(
    count: int = 64, batch: int = 16, dtype: torch.dtype = torch.float32
) -> FunctionTask:
    """Vectors of 12 with 5 real targets each."""
    g = seeded(5)
    x, y = torch.randn(count, 12, generator=g), torch.randn(count, 5, generator=g)
    return vectors(x.to(dtype), y.to(dtype), batch)


def vectors(x: Tensor, y: Tensor, batch: int) -> FunctionTask:
    """Half the squared distance to y, summed over its entries: one term per example."""
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    return FunctionTask(
        batches,
        loss=lambda out, b: 0.5 * (out - b[1]).square().sum(-1),
        evaluation=batches,
    )
