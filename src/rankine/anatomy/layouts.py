"""Where the families keep their parts: a row of names per architecture, read by `walk.family`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    """One stack of blocks, in paths. An encoder-decoder has two.

    - `blocks`, `embedding`, `norm`: relative to the base model (the model without its head).
    - `attention`, `cross`, `mlp`: relative to a block ("" is the block itself). `attention` is the
      module that knows its head size and calls the attention function; `cross` reads the encoder.
    - `steps`: relative to a block, in execution order: role → weight. The weights of a step read
      the same activation. Roles of cross attention begin with "cross_", those of a shared expert
      with "shared_".
    - `rotary`: "half", "interleaved" or None.
    - `by_head`: the rows of a fused q·k·v are grouped by head instead of by role.
    - `norms`: relative to a block: place → (part, where), see `parts.Norm`; `norm_offset` is what
      they add to their stored weight.
    - `parallel`: attention and MLP both read what the block reads.
    - `scaled`: does q·k carry 1/√d where the module does not say?
    - `otherwise`: the layout of blocks that do not follow this one (the dense ones among sparse).
    """

    blocks: str
    embedding: str
    norm: str | None
    attention: str
    mlp: str
    steps: tuple[Mapping[str, str], ...]
    rotary: str | None = None
    cross: str | None = None
    by_head: bool = False
    norms: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    norm_offset: float = 0.0
    parallel: bool = False
    scaled: bool = True
    otherwise: Layout | None = None


QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
#: One norm before each part.
PRE_NORMS = {
    "input_layernorm": ("attention", "input"),
    "post_attention_layernorm": ("mlp", "input"),
}

# -- decoders -------------------------------------------------------------------------------------
LLAMA = Layout(
    blocks="layers",
    embedding="embed_tokens",
    norm="norm",
    attention="self_attn",
    mlp="mlp",
    steps=(
        QKV,
        {"o": "self_attn.o_proj"},
        {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        {"down": "mlp.down_proj"},
    ),
    rotary="half",
    norms=PRE_NORMS,
)

GEMMA = replace(LLAMA, norm_offset=1.0)

#: Gemma 2 and 3: a norm before and one behind each part.
GEMMA2 = replace(
    GEMMA,
    norms={
        "input_layernorm": ("attention", "input"),
        "post_attention_layernorm": ("attention", "output"),
        "pre_feedforward_layernorm": ("mlp", "input"),
        "post_feedforward_layernorm": ("mlp", "output"),
    },
)

PHI3 = replace(
    LLAMA,
    steps=(
        {"qkv": "self_attn.qkv_proj"},
        LLAMA.steps[1],
        {"gate_up": "mlp.gate_up_proj"},
        LLAMA.steps[3],
    ),
)

PHI = replace(
    LLAMA,
    norm="final_layernorm",
    steps=(QKV, {"o": "self_attn.dense"}, {"up": "mlp.fc1"}, {"down": "mlp.fc2"}),
    norms={"input_layernorm": ("attention", "input")},
    parallel=True,
)

GPT_NEOX = Layout(
    blocks="layers",
    embedding="embed_in",
    norm="final_layer_norm",
    attention="attention",
    mlp="mlp",
    steps=(
        {"qkv": "attention.query_key_value"},
        {"o": "attention.dense"},
        {"up": "mlp.dense_h_to_4h"},
        {"down": "mlp.dense_4h_to_h"},
    ),
    rotary="half",
    by_head=True,
    norms=PRE_NORMS,
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
    norms={"ln_1": ("attention", "input"), "ln_2": ("mlp", "input")},
)

OPT = Layout(
    blocks="decoder.layers",
    embedding="decoder.embed_tokens",
    norm="decoder.final_layer_norm",
    attention="self_attn",
    mlp="",
    steps=(QKV, {"o": "self_attn.out_proj"}, {"up": "fc1"}, {"down": "fc2"}),
    norms={
        "self_attn_layer_norm": ("attention", "input"),
        "final_layer_norm": ("mlp", "input"),
    },
)

# -- mixtures of experts --------------------------------------------------------------------------
MIXTRAL = replace(
    LLAMA,
    steps=(
        *LLAMA.steps[:2],
        {"gate_up": "mlp.experts.gate_up_bank"},
        {"down": "mlp.experts.down_bank"},
    ),
)

QWEN_MOE = replace(MIXTRAL, otherwise=LLAMA)

#: Qwen2: a shared expert runs beside the routed ones.
QWEN2_MOE = replace(
    QWEN_MOE,
    steps=(
        *MIXTRAL.steps[:2],
        {
            "shared_gate": "mlp.shared_expert.gate_proj",
            "shared_up": "mlp.shared_expert.up_proj",
        },
        {"shared_down": "mlp.shared_expert.down_proj"},
        *MIXTRAL.steps[2:],
        {"shared_route": "mlp.shared_expert_gate"},
    ),
)

# -- encoders -------------------------------------------------------------------------------------
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
    norms={
        "attention.output.LayerNorm": ("attention", "stream"),
        "output.LayerNorm": ("mlp", "stream"),
    },
)

# -- encoder-decoders -----------------------------------------------------------------------------
BART_ENCODER = replace(
    OPT,
    blocks="encoder.layers",
    embedding="shared",
    norm=None,
    norms={
        "self_attn_layer_norm": ("attention", "stream"),
        "final_layer_norm": ("mlp", "stream"),
    },
)

BART_DECODER = replace(
    BART_ENCODER,
    blocks="decoder.layers",
    cross="encoder_attn",
    steps=(
        *OPT.steps[:2],
        {"cross_q": "encoder_attn.q_proj"},
        {"cross_k": "encoder_attn.k_proj", "cross_v": "encoder_attn.v_proj"},
        {"cross_o": "encoder_attn.out_proj"},
        *OPT.steps[2:],
    ),
    norms={
        "self_attn_layer_norm": ("attention", "stream"),
        "encoder_attn_layer_norm": ("cross", "stream"),
        "final_layer_norm": ("mlp", "stream"),
    },
)


def _t5(stack: str, mlp: str, gated: bool) -> Layout:
    """T5 scales no scores; its first block owns the position biases of all."""
    attention, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    steps: list[Mapping[str, str]] = [
        {role: f"{attention}.{role}" for role in "qkv"},
        {"o": f"{attention}.o"},
    ]
    norms = {"layer.0.layer_norm": ("attention", "input")}
    if stack == "decoder":
        steps += [
            {"cross_q": f"{cross}.q"},
            {"cross_k": f"{cross}.k", "cross_v": f"{cross}.v"},
            {"cross_o": f"{cross}.o"},
        ]
        norms["layer.1.layer_norm"] = ("cross", "input")
    entry = {"gate": f"{mlp}.wi_0", "up": f"{mlp}.wi_1"} if gated else {"up": f"{mlp}.wi"}
    norms[mlp.rpartition(".")[0] + ".layer_norm"] = ("mlp", "input")
    return Layout(
        blocks=f"{stack}.block",
        embedding="shared",
        norm=f"{stack}.final_layer_norm",
        attention=attention,
        mlp=mlp,
        steps=(*steps, entry, {"down": f"{mlp}.wo"}),
        cross=cross if stack == "decoder" else None,
        norms=norms,
        scaled=False,
        otherwise=_t5(stack, mlp, False) if gated else None,
    )


T5 = (
    _t5("encoder", "layer.1.DenseReluDense", gated=True),
    _t5("decoder", "layer.2.DenseReluDense", gated=True),
)
BART = (BART_ENCODER, BART_DECODER)

#: model_type → layout of its stack, or of its stacks in the order they run. Attention biases,
#: grouped heads and QK-norm are read from the modules.
FAMILIES: dict[str, Layout | tuple[Layout, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt_neox": GPT_NEOX,
    "phi": PHI,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "olmoe": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN_MOE,
    "gpt2": GPT2,
    "opt": OPT,
    "bert": BERT,
    "t5": T5,
    "mt5": T5,
    "bart": BART,
}
