"""Where the families keep their parts: a row of names per architecture, read by `walk.family`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Places of the output layer in the classes that stand around a base model, likeliest first.
HEADS = (
    "lm_head",
    "cls.predictions.decoder",
    "score",
    "classifier",
    "qa_outputs",
    "cls.seq_relationship",
)


@dataclass(frozen=True)
class Layout:
    """One architecture family, in paths.

    - `blocks`, `embedding`, `norm`: relative to the base model (the model without its head).
    - `attention`, `mlp`: relative to a block ("" is the block itself). `attention` is the module
      that knows its head size and calls the attention function.
    - `steps`: relative to a block, in execution order: role → weight. The weights of a step read
      the same activation.
    - `rotary`: "half", "interleaved" or None.
    """

    blocks: str
    embedding: str
    norm: str | None
    attention: str
    mlp: str
    steps: tuple[Mapping[str, str], ...]
    rotary: str | None = None


LLAMA = Layout(
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    attention="self_attn",
    mlp="mlp",
    steps=(
        {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        {"o": "self_attn.o_proj"},
        {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        {"down": "mlp.down_proj"},
    ),
    rotary="half",
)

GPT2 = Layout(
    blocks="h",
    embedding="wte",
    norm="ln_f",
    attention="attn",
    mlp="mlp",
    steps=(
        {"qkv": "attn.c_attn"},
        {"o": "attn.c_proj"},
        {"up": "mlp.c_fc"},
        {"down": "mlp.c_proj"},
    ),
)

OPT = Layout(
    blocks="decoder.layers",
    embedding="decoder.embed_tokens",
    norm="decoder.final_layer_norm",
    attention="self_attn",
    mlp="",
    steps=(
        {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        {"o": "self_attn.out_proj"},
        {"up": "fc1"},
        {"down": "fc2"},
    ),
)

BERT = Layout(
    blocks="encoder.layer",
    embedding="embeddings.word_embeddings",
    norm=None,
    attention="attention.self",
    mlp="",
    steps=(
        {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
        {"o": "attention.output.dense"},
        {"up": "intermediate.dense"},
        {"down": "output.dense"},
    ),
)

#: model_type → layout. Attention biases, grouped heads and QK-norm are read from the modules.
FAMILIES: dict[str, Layout] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "opt": OPT,
    "bert": BERT,
}
