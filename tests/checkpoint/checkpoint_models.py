"""Tiny models of every family the checkpoint tests need, and patches over them. No download."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import Structure, matrix

VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
LLAMA = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**overrides: Any) -> Any:
    """GQA and tied embeddings."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, **overrides})
    return transformers.LlamaForCausalLM(config).eval()


def qwen2() -> Any:
    """Biases on q, k, v."""
    torch.manual_seed(1)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(tensor)
    return model


def gpt2() -> Any:
    """Conv1D, which stores its weight transposed; biases; tied embeddings."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> Any:
    """An encoder with a classification head."""
    torch.manual_seed(3)
    config = transformers.BertConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4)
    return transformers.BertForSequenceClassification(config).eval()


def fitted(model: nn.Module, path: str, structure: Structure) -> Patch:
    """The patch that puts `structure`, fitted to the weight that stands there, at `path`."""
    with torch.no_grad():
        w = matrix(model.get_submodule(path)).detach()
        return Patch.of(path, structure, structure.encode(w, Metric()))


def fitted_all(model: nn.Module, places: dict[str, Structure]) -> Patch:
    """One patch over several paths."""
    patch = Patch()
    for path, structure in places.items():
        patch |= fitted(model, path, structure)
    return patch


def ids() -> torch.Tensor:
    """Two rows of token ids."""
    return torch.arange(24).reshape(2, 12) % VOCABULARY


def logits(model: Any) -> torch.Tensor:
    """Logits on `ids()`."""
    with torch.no_grad():
        out = model(ids())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
