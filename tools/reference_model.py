"""The reference model as it is trained: the mathematics of transformers' Llama, laid out for speed.

Queries, keys and values are one product and so are gate and up; attention is computed block by
block, so that a query block never meets the keys after it. Compiled on two CPU cores this trains
1.5 times as fast as the transformers class; `to_llama` hands over the weights by name.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64
ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `heads` and `kv_heads` of HEAD_DIM each."""

    width: int
    blocks: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 2048
    context: int = 1024

    def variant(self, name: str) -> "Shape":
        """`gqa` as given; `mha` is the sibling with one key and value head per query head."""
        return replace(self, kv_heads=self.heads) if name == "mha" else self

    def llama(self) -> dict[str, object]:
        """The fields of a transformers LlamaConfig."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": self.context,
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "tie_word_embeddings": True,
        }


SIZES = {
    "small": Shape(192, 6, 256, 4, 2),
    "medium": Shape(256, 8, 512, 4, 2),
    "large": Shape(512, 8, 1408, 8, 4, vocabulary=4096),
}


def normalise(x_btd: Tensor, weight_d: Tensor) -> Tensor:
    """RMSNorm in float32."""
    wide = x_btd.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
    return (wide * scale * weight_d).to(x_btd.dtype)


def rotate(x_bthd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the first half of a head against the second."""
    a, b = x_bthd.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_bthd.dtype)


def attend(q_bhtd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor) -> Tensor:
    """Causal grouped-query attention; on a CPU in query blocks that skip the future."""
    if q_bhtd.is_cuda:
        return F.scaled_dot_product_attention(
            q_bhtd, k_bgtd, v_bgtd, is_causal=True, enable_gqa=True
        )
    batch, heads, length, size = q_bhtd.shape
    groups, block = k_bgtd.shape[1], min(length, 256 if length > 512 else 128)
    # The query heads of a group share keys, so they become rows of one product.
    q = q_bhtd.view(batch, groups, heads // groups, length, size)
    parts = []
    for start in range(0, length, block):
        end = start + block
        rows = q[:, :, :, start:end].reshape(batch, groups, -1, size)
        scores = (rows @ k_bgtd[:, :, :end].transpose(-1, -2)).float() * size**-0.5
        positions = torch.arange(end, device=scores.device)
        past = (positions[start:, None] >= positions).repeat(heads // groups, 1)
        weights = scores.masked_fill(~past, float("-inf")).softmax(-1).to(v_bgtd.dtype)
        parts.append((weights @ v_bgtd[:, :, :end]).view(batch, groups, -1, block, size))
    return torch.cat(parts, 3).view(batch, heads, length, size)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.norm_attention = nn.Parameter(torch.ones(shape.width))
        self.norm_mlp = nn.Parameter(torch.ones(shape.width))
        rows = (shape.heads + 2 * shape.kv_heads) * HEAD_DIM
        self.qkv = nn.Linear(shape.width, rows, bias=False)
        self.o = nn.Linear(shape.heads * HEAD_DIM, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x_btd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x_btd.shape
        qkv = self.qkv(normalise(x_btd, self.norm_attention)).view(batch, length, -1, HEAD_DIM)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 2)
        q, k = (rotate(t, cos, sin).transpose(1, 2) for t in (q, k))
        mixed = attend(q, k, v.transpose(1, 2)).transpose(1, 2).reshape(batch, length, -1)
        x_btd = x_btd + self.o(mixed)
        gate, up = self.gate_up(normalise(x_btd, self.norm_mlp)).chunk(2, -1)
        return x_btd + self.down(F.silu(gate) * up)


class Reference(nn.Module):
    """The language model; called with tokens and targets it returns the mean loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.Parameter(torch.ones(shape.width))
        inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.arange(shape.context)[:, None] * inverse
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def initialise(self, seed: int) -> None:
        """Normal weights that keep the scale of what they read: at this width the customary 0.02 is
        far too small beside the learning rate. What adds to the stream is smaller, so that depth
        does not swell it."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("o.weight", "down.weight"))
                scale = (2 * self.shape.blocks) ** -0.5 if into_stream else 1.0
                scale *= EMBEDDING_STD if name.startswith("embedding") else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=scale, generator=generator)

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
        length = tokens_bt.shape[1]
        x_btd = self.embedding(tokens_bt)
        if torch.is_autocast_enabled(x_btd.device.type):
            x_btd = x_btd.to(torch.get_autocast_dtype(x_btd.device.type))
        for block in self.blocks:
            x_btd = block(x_btd, self.cos[:length], self.sin[:length])
        logits = F.linear(normalise(x_btd, self.norm), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_bt.flatten())


def to_llama(model: Reference) -> dict[str, Tensor]:
    """The weights under the names of transformers' LlamaForCausalLM."""
    shape = model.shape
    out = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm}
    rows = [shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM, shape.kv_heads * HEAD_DIM]
    for index, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split(rows)
        gate, up = block.gate_up.weight.chunk(2)
        named = {
            "input_layernorm": block.norm_attention,
            "post_attention_layernorm": block.norm_mlp,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.o.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down.weight,
        }
        out |= {f"model.layers.{index}.{name}.weight": t for name, t in named.items()}
    return {name: t.detach().clone().contiguous() for name, t in out.items()}
