"""Tiny seeded models and tasks that several rooms' tests share. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from rankine.tasks import FunctionTask

VOCABULARY = 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _built(auto: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms leave their trivial start
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llama(seed: int = 0, **overrides: Any) -> Any:
    """Grouped heads (4:2), SwiGLU, tied embeddings."""
    fields = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
    fields |= {"tie_word_embeddings": True, **overrides}
    return _built(tf.AutoModelForCausalLM, tf.LlamaConfig(**fields), seed)


def qwen2(seed: int = 0, **overrides: Any) -> Any:
    """Biases on q, k and v."""
    fields = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, **overrides}
    return _built(tf.AutoModelForCausalLM, tf.Qwen2Config(**fields), seed)


def gpt2(seed: int = 0, **overrides: Any) -> Any:
    """Conv1D, biases everywhere, fused q·k·v."""
    fields = {**COMMON, "n_inner": 48, **overrides}
    return _built(tf.AutoModelForCausalLM, tf.GPT2Config(**fields), seed)


def opt(seed: int = 0, **overrides: Any) -> Any:
    """Learned positions with an offset, ReLU."""
    fields = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **overrides}
    return _built(tf.AutoModelForCausalLM, tf.OPTConfig(**fields), seed)


def bert(seed: int = 0, **overrides: Any) -> Any:
    """A bidirectional encoder with a classifier of two classes."""
    fields = {**COMMON, "intermediate_size": 48, **overrides}
    return _built(tf.AutoModelForSequenceClassification, tf.BertConfig(**fields), seed)


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


class Tokens(FunctionTask):
    """Next-token prediction on given ids; right-padded where `lengths` says so. The loss is
    written down here once more, independently of the package's own."""

    def __init__(self, ids: Tensor, batch: int = 2, lengths: Tensor | None = None):
        masks = torch.ones_like(ids)
        if lengths is not None:
            masks = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batches = [
            {"input_ids": i, "attention_mask": m}
            for i, m in zip(ids.split(batch), masks.split(batch), strict=True)
        ]
        super().__init__(batches, evaluation=batches)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Without a cache."""
        return model(**batch, use_cache=False)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Mean nats of each window's scored tokens."""
        logits, targets = outputs.logits[:, :-1], batch["input_ids"][:, 1:]
        nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        counts = batch["attention_mask"][:, 1:]
        return (nats * counts).sum(1) / counts.sum(1)

    def terms(self, batch: Any) -> Tensor:
        """Scored tokens."""
        return batch["attention_mask"][:, 1:].sum(1)

    def mask(self, batch: Any) -> Tensor:
        """No padding."""
        return batch["attention_mask"].bool()


def ids(count: int = 6, length: int = 10, seed: int = 1) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (count, length), generator=seeded(seed))


def tokens(count: int = 6, length: int = 10, batch: int = 2, padded: bool = False) -> Tokens:
    """A task of random tokens."""
    lengths = None
    if padded:
        lengths = torch.randint(length // 2, length + 1, (count,), generator=seeded(2))
        lengths[0] = length
    return Tokens(ids(count, length), batch, lengths)


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


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)
