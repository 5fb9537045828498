"""Data that a tiny Llama learns in a second, the Llama, and compressed copies of it."""

import copy

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import matrix
from rankine.tasks import FunctionTask

VOCABULARY = 32


def counting(rows, seed):
    """(rows, 16) arithmetic progressions modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    stride = torch.randint(1, 4, (rows, 1), generator=generator)
    return (start + stride * torch.arange(16)) % VOCABULARY


def batches(rows, seed, size=16):
    return [{"input_ids": part} for part in counting(rows, seed).split(size)]


def token_loss(outputs, batch):
    logits, ids = outputs.logits[:, :-1], batch["input_ids"][:, 1:]
    nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return nats.view(len(ids), -1).mean(1)


def task_of(train_rows=256, train_seed=2, **overrides):
    parts = {"loss": token_loss, "evaluation": batches(64, 3), **overrides}
    return FunctionTask(batches(16, 1), train=batches(train_rows, train_seed), **parts)


def llama(**overrides):
    """Two blocks, GQA, tied embeddings."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **overrides}))


def linear_paths(model):
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"]


def compressed(model, structures):
    """A copy with `structures` in turn over its linear layers, and the patch that says so."""
    patch = Patch()
    for n, path in enumerate(linear_paths(model)):
        structure = structures[n % len(structures)]
        w = matrix(model.get_submodule(path)).detach()
        patch |= Patch.of(path, structure, structure.encode(w, Metric()))
    return patch.apply(copy.deepcopy(model)), patch
