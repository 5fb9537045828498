"""Coupled units: the rows and columns of several matrices that live or die together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.anatomy.parts import Block
from rankine.errors import UserError


@dataclass(frozen=True, eq=False)
class Units:
    """Units of one kind: path → LongTensor (units, rows or columns of each)."""

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(len(index) for index in self.columns.values())

    def select(self, keep: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(rows, columns) that stay when these units do, as `patch.narrow` takes them: path →
        sorted LongTensor (the order of `keep` does not matter). Raises UserError on an empty or
        impossible choice."""
        chosen = sorted(set(keep))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(self):
            raise UserError(
                f"expected at least one unit to keep, of 0 to {len(self) - 1}, found {list(keep)}"
            )
        at = torch.tensor(chosen)
        rows = {path: index[at].flatten().sort().values for path, index in self.rows.items()}
        columns = {path: index[at].flatten().sort().values for path, index in self.columns.items()}
        return rows, columns


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
