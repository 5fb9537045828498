"""Tiny random models, one per family: two layers, width 32, four heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

Build = Callable[..., nn.Module]

COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "llama": (tf.LlamaConfig, {**GATED, "tie_word_embeddings": True}),
    "mistral": (tf.MistralConfig, {**GATED, "sliding_window": 8}),
    "qwen2": (tf.Qwen2Config, GATED),
    "qwen3": (tf.Qwen3Config, {**GATED, "head_dim": 16}),
    "gpt2": (tf.GPT2Config, {**COMMON, "n_inner": 48}),
    "opt": (tf.OPTConfig, {**COMMON, "ffn_dim": 48}),
    "bert": (tf.BertConfig, {**COMMON, "intermediate_size": 48}),
}


@pytest.fixture
def tiny() -> Build:
    """tiny("llama", head=AutoModelForCausalLM, **config): a seeded model in eval mode, with
    biases and norms away from their trivial start."""

    def build(family: str, head: type | None = None, **overrides: object) -> nn.Module:
        cls, fields = FAMILIES[family]
        default = tf.AutoModelForMaskedLM if family == "bert" else tf.AutoModelForCausalLM
        torch.manual_seed(0)
        model = (head or default).from_config(cls(**{**fields, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.is_meta:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of seven token ids without padding."""
    return torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(1))
