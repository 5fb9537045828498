"""Tiny seeded language models and a task of random tokens. Nothing is downloaded."""

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


def built(auto: Any, config: Any, seed: int) -> Any:
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
    return built(tf.AutoModelForCausalLM, tf.LlamaConfig(**fields), seed)


def gpt2(seed: int = 0, **overrides: Any) -> Any:
    """Conv1D, biases everywhere, fused q·k·v."""
    fields = {**COMMON, "n_inner": 48, **overrides}
    return built(tf.AutoModelForCausalLM, tf.GPT2Config(**fields), seed)


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


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)
