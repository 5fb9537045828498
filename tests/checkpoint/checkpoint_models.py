"""Tiny models of every family the checkpoint tests need, and patches over them. No download."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn

from rankine.metric import Metric
from rankine.patch import Patch, narrow
from rankine.structures import LowRank, Quantized, Structure, Sum, matrix

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


# -- patched models, one per family ---------------------------------------------------------------
MIXED = (
    LowRank(5),
    LowRank(7, pivoted=True),
    Quantized(4, group=16),
    Sum(base=Quantized(3, group=16), low_rank=LowRank(3)),
    Quantized(2, group=10),
    Quantized(8, axis=-2),
)


def linear_paths(model: nn.Module, *skip: str) -> list[str]:
    """Paths of linear layers and Conv1Ds, without heads."""
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not any(word in path for word in ("lm_head", "classifier", *skip))
    ]


def mixed(model: nn.Module, *skip: str) -> Patch:
    """All structures in turn over the model's linear layers."""
    paths = linear_paths(model, *skip)
    return fitted_all(model, {p: MIXED[n % len(MIXED)] for n, p in enumerate(paths)})


def shared_basis(model: nn.Module, first: str, second: str, rank: int = 6) -> Patch:
    """Two layers with one `down`: fitted to both weights side by side."""
    with torch.no_grad():
        both = torch.cat([matrix(model.get_submodule(p)).detach() for p in (first, second)])
    parts = LowRank(rank).encode(both, Metric())
    rows = matrix(model.get_submodule(first)).shape[0]
    down, up = parts["down.weight"], parts["up.weight"]
    one = Patch.of(first, LowRank(rank), {"down.weight": down, "up.weight": up[:rows].clone()})
    two = Patch.of(second, LowRank(rank), {"up.weight": up[rows:].clone()})
    tie = Patch(tied={f"{second}.down.weight": f"{first}.down.weight"})
    return one | two | tie


def shared_table(model: Any, rank: int = 9) -> Patch:
    """Embedding and head of a tied Llama through one (vocabulary, rank) table."""
    table = LowRank(rank, view="table")
    embedding = fitted(model, "model.embed_tokens", table)
    down = embedding.tensors["model.embed_tokens.up.weight"].mT.contiguous()
    head = Patch.of("lm_head", LowRank(rank), {"down.weight": down})
    tie = Patch(tied={"lm_head.up.weight": "model.embed_tokens.down.weight"})
    return embedding | head | tie


def narrower(model: Any) -> Patch:
    """Half of the units of the first block's MLP."""
    mlp, keep = "model.layers.0.mlp", torch.arange(0, 48, 2)
    rows = {f"{mlp}.gate_proj": keep, f"{mlp}.up_proj": keep}
    return narrow(model, rows, {f"{mlp}.down_proj": keep})


def patched_llama() -> tuple[Any, Patch]:
    """Every structure, and a basis shared between layers, under tied embeddings."""
    model = llama()
    down = [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    return model, mixed(model) | shared_basis(model, *down)


def patched_tables() -> tuple[Any, Patch]:
    """Factored embedding and head that share a table."""
    model = llama()
    return model, shared_table(model)


def patched_qwen2() -> tuple[Any, Patch]:
    """Biases; one MLP narrower, the rest mixed."""
    model = qwen2()
    return model, mixed(model, "layers.0.mlp") | narrower(model)


def patched_gpt2() -> tuple[Any, Patch]:
    """Every structure in the place of Conv1Ds."""
    model = gpt2()
    return model, mixed(model)


def patched_bert() -> tuple[Any, Patch]:
    """Every structure in an encoder, and one layer with a bias of its own."""
    model = bert()
    patch = mixed(model)
    path = "bert.encoder.layer.0.attention.self.query"
    centred = dataclasses.replace(patch.modules[path], bias=True)
    return model, patch | Patch.of(
        path, centred, LowRank(5).encode(matrix(model.get_submodule(path)).detach(), Metric())
    )


def patched_factors() -> tuple[Any, Patch]:
    """Two factors everywhere, and nothing else: what PEFT and merging take."""
    model = llama(tie_word_embeddings=False)
    return model, fitted_all(model, {p: LowRank(6) for p in linear_paths(model)})


PATCHED = {
    "llama": patched_llama,
    "tables": patched_tables,
    "qwen2": patched_qwen2,
    "gpt2": patched_gpt2,
    "bert": patched_bert,
    "factors": patched_factors,
}
