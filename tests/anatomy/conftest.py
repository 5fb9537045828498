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
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 20.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
T5 = {
    "vocab_size": 48,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
#: What stands around the base model where it is not a causal language model.
HEADS = {
    "bert": tf.AutoModelForMaskedLM,
    "t5": tf.AutoModelForSeq2SeqLM,
    "t5_gated": tf.AutoModelForSeq2SeqLM,
    "bart": tf.AutoModelForSeq2SeqLM,
}
FAMILIES = {
    "llama": (tf.LlamaConfig, {**GATED, "tie_word_embeddings": True}),
    "mistral": (tf.MistralConfig, {**GATED, "sliding_window": 8}),
    "qwen2": (tf.Qwen2Config, GATED),
    "qwen3": (tf.Qwen3Config, {**GATED, "head_dim": 16}),
    "gpt2": (tf.GPT2Config, {**COMMON, "n_inner": 48}),
    "opt": (tf.OPTConfig, {**COMMON, "ffn_dim": 48}),
    "bert": (tf.BertConfig, {**COMMON, "intermediate_size": 48}),
    "gemma": (tf.GemmaConfig, {**GATED, "head_dim": 16}),
    "gemma2": (tf.Gemma2Config, {**GATED, **GEMMA}),
    "gemma3_text": (tf.Gemma3TextConfig, {**GATED, **GEMMA, "final_logit_softcapping": None}),
    "gpt_neox": (tf.GPTNeoXConfig, {**COMMON, "intermediate_size": 48}),
    "phi": (tf.PhiConfig, GATED),
    "phi3": (tf.Phi3Config, {**GATED, "sliding_window": 8}),
    "mixtral": (tf.MixtralConfig, {**GATED, "num_local_experts": 4, "sliding_window": None}),
    "olmoe": (tf.OlmoeConfig, {**GATED, **EXPERTS}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        {
            **GATED,
            **EXPERTS,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {**GATED, **EXPERTS, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "t5": (tf.T5Config, T5),
    "t5_gated": (tf.T5Config, {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (
        tf.BartConfig,
        {
            "vocab_size": 48,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
}


@pytest.fixture
def tiny() -> Build:
    """tiny("llama", head=AutoModelForCausalLM, **config): a seeded model in eval mode, with
    biases and norms away from their trivial start."""

    def build(family: str, head: type | None = None, **overrides: object) -> nn.Module:
        cls, fields = FAMILIES[family]
        default = HEADS.get(family, tf.AutoModelForCausalLM)
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
