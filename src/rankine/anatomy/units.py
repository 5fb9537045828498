"""Coupled units: the rows and columns of several matrices that live or die together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankine.anatomy.parts import Anatomy, Block
from rankine.errors import UserError

#: What a weight does with the residual stream, by role (without "cross_" or "shared_").
READERS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "route", "head")
WRITERS = ("o", "down", "embedding")


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one kind: path → LongTensor (units, rows or columns of each). `vectors`: the same
    for tensors that are no matrices (norms), by name, along their last dimension."""

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return next(len(index) for index in self.columns.values())

    def select(
        self, keep: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """(rows, columns, vectors) that stay when these units do, as `patch.narrow` takes them:
        path or name → sorted LongTensor (the order of `keep` does not matter). Raises UserError on
        an empty or impossible choice."""
        chosen = sorted(set(keep))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self):
            raise UserError(
                f"expected at least one unit to keep, of 0 to {len(self) - 1}, found {list(keep)}"
            )
        at = torch.tensor(chosen)

        def stay(units: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: index[at].flatten().sort().values for name, index in units.items()}

        return stay(self.rows), stay(self.columns), stay(self.vectors)


def ffn_units(block: Block) -> Units:
    """One unit per hidden neuron j of the MLP: rows j of gate and up, column j of down. In a bank
    of experts neuron j of every expert."""
    mlp = block.mlp
    if mlp is None:
        raise UserError(_undescribed(block, "MLP"))
    each = torch.arange(mlp.width)[:, None]
    parts = {"up": mlp.up} if mlp.gate is None else {"gate": mlp.gate, "up": mlp.up}
    return Units(_rows(block, parts, dict.fromkeys(parts, each)), {mlp.down: each})


def kv_groups(block: Block) -> Units:
    """One unit per key-value head m: its rows of k and v, the rows of the query heads that read
    it, and their columns of o. The ratio of query to key-value heads stays."""
    attention = block.attention
    if attention is None:
        raise UserError(_undescribed(block, "attention"))
    heads = torch.arange(attention.heads * attention.head_dim).view(attention.kv_heads, -1)
    kv = torch.arange(attention.kv_heads * attention.head_dim).view(attention.kv_heads, -1)
    parts = {"q": attention.q, "k": attention.k, "v": attention.v}
    return Units(_rows(block, parts, {"q": heads, "k": kv, "v": kv}), {attention.o: heads})


def hidden_units(anatomy: Anatomy, model: nn.Module) -> Units:
    """One unit per dimension j of the residual stream: row j of everything that writes it (the
    embedding, o, down), column j of everything that reads it, entry j of every norm, router and
    table of positions. The config's width is the caller's to change.

    Raises UserError where not everything that touches the stream is known.
    """
    table = next((w for w in anatomy.outside if w.path == anatomy.embedding), None)
    strange = [w.path for w in anatomy.outside if w.role == "linear"]
    if table is None or strange or not all(block.norms for block in anatomy.blocks):
        raise UserError(
            "expected a described model with a plain embedding and nothing but its head behind the "
            f"blocks, found {strange[0] if strange else anatomy.family}: its hidden dimensions "
            "cannot be told apart"
        )
    width = table.shape[0]
    each = torch.arange(width)[:, None]
    kinds = [(w, w.role.removeprefix("cross_").removeprefix("shared_")) for w in anatomy.weights]
    rows = {w.path: each for w, kind in kinds if kind in WRITERS and w.shape[0] == width}
    columns = {w.path: each for w, kind in kinds if kind in READERS}
    return Units(rows, columns, dict.fromkeys(_stream_tensors(anatomy, model, width), each))


def _stream_tensors(anatomy: Anatomy, model: nn.Module, width: int) -> list[str]:
    """Names of the tensors of the stream's width that belong to no weight and no attention."""
    known = [weight.path for weight in anatomy.weights]
    known += [a.path for b in anatomy.blocks for a in (b.attention, b.cross) if a is not None]
    stacked = {f"{path.removesuffix('_bank')}_proj" for path in known if path.endswith("_bank")}
    inside = tuple(f"{path}." for path in known)
    return [
        name
        for name, tensor in model.named_parameters()
        if tensor.shape[-1:] == (width,) and not name.startswith(inside) and name not in stacked
    ]


def _rows(block: Block, parts: Mapping[str, str], units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Path → (units, rows of each): the units' rows of every part, where the part's matrix holds
    them. Parts of one fused matrix lie side by side."""
    fused = {weight.path: weight.rows for weight in block.weights}
    found: dict[str, Tensor] = {}
    for role, path in parts.items():
        at = units[role]
        if fused.get(path):
            ranges = [torch.arange(a, b) for part, a, b in fused[path] if part == role]
            at = torch.cat(ranges)[at]
        found[path] = at if path not in found else torch.cat([found[path], at], 1)
    return found


def _undescribed(block: Block, what: str) -> str:
    return (
        f'expected a block with a described {what}, found none at "{block.path}": '
        "register the architecture with anatomy.register"
    )
