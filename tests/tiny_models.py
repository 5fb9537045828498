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


GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}


def gemma2(seed: int = 0, **overrides: Any) -> Any:
    """Wide heads, norms on both sides of every part, capped logits, every other layer a window."""
    fields = {**GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
    return built(tf.AutoModelForCausalLM, tf.Gemma2Config(**{**fields, **overrides}), seed)


def gemma3(seed: int = 0, **overrides: Any) -> Any:
    """As Gemma 2, with norms on q and k and a rotary base per type of layer."""
    fields = {**GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
    fields["layer_types"] = ["sliding_attention", "full_attention"]
    return built(tf.AutoModelForCausalLM, tf.Gemma3TextConfig(**{**fields, **overrides}), seed)


def gpt_neox(seed: int = 0, **overrides: Any) -> Any:
    """q·k·v fused head by head, a quarter of each head turned, attention beside the MLP."""
    fields = {**COMMON, "intermediate_size": 48, **overrides}
    return built(tf.AutoModelForCausalLM, tf.GPTNeoXConfig(**fields), seed)


def phi(seed: int = 0, **overrides: Any) -> Any:
    """Half of each head turned, biases everywhere, one norm for attention and MLP."""
    return built(tf.AutoModelForCausalLM, tf.PhiConfig(**{**GATED, **overrides}), seed)


def phi3(seed: int = 0, **overrides: Any) -> Any:
    """q·k·v and gate·up fused, with fewer key-value heads."""
    return built(tf.AutoModelForCausalLM, tf.Phi3Config(**{**GATED, **overrides}), seed)


def mixtral(seed: int = 0, **overrides: Any) -> Any:
    """Four experts, two at a time, stacked in two parameters."""
    fields = {**GATED, "num_local_experts": 4, **overrides}
    return built(tf.AutoModelForCausalLM, tf.MixtralConfig(**fields), seed)


def qwen2_moe(seed: int = 0, **overrides: Any) -> Any:
    """A shared expert beside four routed ones; the second layer is dense."""
    fields = {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    fields |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, **overrides}
    return built(tf.AutoModelForCausalLM, tf.Qwen2MoeConfig(**fields), seed)


def qwen3_moe(seed: int = 0, **overrides: Any) -> Any:
    """Norms on q and k, no shared expert."""
    fields = {**GATED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    fields |= {"moe_intermediate_size": 24, **overrides}
    return built(tf.AutoModelForCausalLM, tf.Qwen3MoeConfig(**fields), seed)


LANGUAGE = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "opt": opt}


#: What the first four do not have.
MORE_LANGUAGE = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "phi3": phi3,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}


def t5(seed: int = 0, **overrides: Any) -> Any:
    """An encoder and a deeper decoder; position biases that the first block owns, no scale."""
    fields = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    fields |= {"num_decoder_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    fields |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, **overrides}
    return built(tf.AutoModelForSeq2SeqLM, tf.T5Config(**fields), seed)


def bart(seed: int = 0, **overrides: Any) -> Any:
    """An encoder and a deeper decoder; biases, learned positions, norms behind the sums."""
    fields = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3}
    fields |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    fields |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2, **overrides}
    return built(tf.AutoModelForSeq2SeqLM, tf.BartConfig(**fields), seed)


TRANSLATION = {"t5": t5, "bart": bart}


def translated(count: int = 6, length: int = 10, batch: int = 2) -> FunctionTask:
    """Padded source sequences, each with a shorter target to predict: terms are its tokens."""
    source, target = ids(count, length), ids(count, length - 3, seed=7)
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=seeded(8))
    mask = (torch.arange(length) < lengths).long()
    batches = [
        {"input_ids": i, "attention_mask": m, "decoder_input_ids": t}
        for i, m, t in zip(source.split(batch), mask.split(batch), target.split(batch), strict=True)
    ]

    def loss(out: Any, b: Any) -> Tensor:
        nats = F.cross_entropy(
            out.logits[:, :-1].mT, b["decoder_input_ids"][:, 1:], reduction="none"
        )
        return nats.mean(1)

    return FunctionTask(
        batches,
        forward=lambda model, b: model(**b, use_cache=False),
        loss=loss,
        evaluation=batches,
    )


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
