"""What a model is made of, as values: weights, blocks, and the targets that methods bid on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rankine.errors import UserError


@dataclass(frozen=True)
class Weight:
    """One matrix that a method may replace: y = x Wᵀ (an embedding is a map on one-hot ids).

    - `path`: the module that owns it, such as "model.layers.0.self_attn.q_proj"; of a bank that
      is still a plain parameter, the path that a module in its place will have.
    - `role`: q k v o gate up down qkv gate_up embedding head linear; "cross_" and "shared_" before
      those of cross attention and of a shared expert.
    - `block`: index of its block, -1 outside.
    - `shape`: (outputs, inputs), whatever stands there now.
    - `operator`: linear | conv1d | embedding | bank.
    - `reads`: key of the activation it reads = path of the first module in execution order that
      reads it; q, k, v share one, gate and up share one. Statistics are keyed by it.
    - `rows`: for a fused matrix, (role, start, stop) of each part's output rows.
    - `bias`: does the module add one?
    - `tied_with`: name of the earlier tensor whose storage it shares.
    - `copies`: how many matrices of this shape a bank stacks (a layer's experts).
    """

    path: str
    role: str
    block: int
    shape: tuple[int, int]
    operator: str
    reads: str
    rows: tuple[tuple[str, int, int], ...] = ()
    bias: bool = False
    tied_with: str | None = None
    copies: int = 1

    @property
    def size(self) -> int:
        """Number of entries, of all copies."""
        return self.copies * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Attention:
    """An attention layer: sizes as they stand (a pruned layer has fewer heads than the config).

    `path` is the module that calls the attention function; `q`, `k`, `v`, `o` are module paths,
    the first three the same one where they are fused. `scale` multiplies q·k, whose product is
    then bent below `softcap` in size, where there is one. `rotary` is "half" (halves of a head are
    paired), "interleaved" (neighbours are) or None; `rotary_fraction` is the turned part of a
    head, `rotary_base` the base of its frequencies. `bias`: q, k or v add one. `window` is the
    sliding window in tokens.
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: str | None
    rotary_fraction: float
    qk_norm: bool
    bias: bool
    window: int | None
    q: str
    k: str
    v: str
    o: str
    softcap: float | None = None
    rotary_base: float | None = None


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer: down(act(gate) · up), or down(act(up)) where there is no gate. `gate`
    and `up` are the same path where they are fused. `experts`: how many of them it stacks."""

    path: str
    width: int
    gate: str | None
    up: str
    down: str
    activation: str
    experts: int = 1


@dataclass(frozen=True)
class Norm:
    """A normalization: it multiplies by its stored weight plus `offset` (1 in Gemma).

    `part`: attention | cross | mlp. `where`: "input" of that part, its "output" before it joins
    the residual stream, or the "stream" behind it. `kind`: rms | layer.
    """

    path: str
    kind: str
    part: str
    where: str
    offset: float = 0.0


@dataclass(frozen=True)
class Block:
    """One layer of a stack. `steps` are in execution order: the weights of one step read the
    same activation, such as (q, k, v) → (o,) → (gate, up) → (down,).

    `cross` reads the encoder's output, `shared` is the expert every token takes. `parallel`:
    attention and MLP both read what the block reads. `stack` tells an encoder's blocks (0) from
    its decoder's (1).
    """

    path: str
    index: int
    attention: Attention | None
    mlp: Mlp | None
    steps: tuple[tuple[Weight, ...], ...]
    cross: Attention | None = None
    shared: Mlp | None = None
    norms: tuple[Norm, ...] = ()
    parallel: bool = False
    stack: int = 0

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All weights, in execution order."""
        return tuple(weight for step in self.steps for weight in step)


@dataclass(frozen=True)
class Anatomy:
    """A described model.

    `family` is the model type, or "generic". `outside` holds what no block does: embeddings, head,
    others, in registration order. `prefix` is the base model's prefix ("model"), whether or not a
    head stands around it. `embedding`, `head`, `norm` are the paths of the token embedding, the
    output layer and the final norm, where they are known. `softcap` bounds the logits.
    """

    family: str
    blocks: tuple[Block, ...]
    outside: tuple[Weight, ...] = ()
    prefix: str = ""
    embedding: str | None = None
    head: str | None = None
    norm: str | None = None
    softcap: float | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Block weights in execution order, then those outside."""
        return self.linears + self.outside

    @property
    def linears(self) -> tuple[Weight, ...]:
        """The weights inside blocks, in execution order."""
        return tuple(weight for block in self.blocks for weight in block.weights)

    def weight(self, path: str) -> Weight:
        """The weight at a path; raises UserError with a few real paths when there is none."""
        if path not in self._by_path:
            known = "; ".join(list(self._by_path)[:3])
            raise UserError(f'expected the path of a weight (such as {known}), found "{path}"')
        return self._by_path[path]

    @cached_property
    def _by_path(self) -> dict[str, Weight]:
        return {weight.path: weight for weight in self.weights}


@dataclass(frozen=True)
class Target:
    """What is fitted together: the unit of bidding, fitting and journalling.

    `kind`: weight | residual | group | pair | attention | mlp | table. A group is layers of one
    role side by side, with the same inputs' width; a table is an embedding and what shares its
    storage.
    """

    weights: tuple[Weight, ...]
    kind: str = "weight"

    @property
    def id(self) -> str:
        """Stable and unique: the path of a plain weight, else the kind and all paths."""
        if self.kind == "weight" and len(self.weights) == 1:
            return self.weights[0].path
        return f"{self.kind}:{'+'.join(self.members)}"

    @property
    def members(self) -> tuple[str, ...]:
        """Paths of the weights, in order."""
        return tuple(weight.path for weight in self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the matrix that is fitted: a group's weights stand on top of each
        other, a table's is the embedding; raises ValueError where several weights are none."""
        if self.kind == "group":
            return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]
        if self.kind == "table":
            return self.weights[0].shape
        (weight,) = self.weights
        return weight.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """`shape`, behind the number of copies where it is a bank."""
        first = self.weights[0]
        return (first.copies, *self.shape) if first.operator == "bank" else self.shape

    @property
    def size(self) -> int:
        """Number of stored weights: a matrix that shares another member's storage adds none."""
        own = {f"{weight.path}.weight" for weight in self.weights}
        return sum(w.size for w in self.weights if w.tied_with not in own)

    @property
    def block(self) -> int:
        """Index of the first weight's block, -1 outside."""
        return self.weights[0].block
