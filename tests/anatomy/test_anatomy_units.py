"""Slicing coupled units equals zeroing the others, on the running model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankine import anatomy
from rankine.anatomy import Block, Units, ffn_units, kv_groups
from rankine.errors import UserError
from rankine.patch import narrow
from rankine.structures import matrix


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def zeroed(model: nn.Module, units: Units, dead: list[int]) -> nn.Module:
    """A copy in which nothing downstream reads the dead units."""
    model = copy.deepcopy(model)
    _, columns = units.select(dead)
    with torch.no_grad():
        for path, index in columns.items():
            matrix(model.get_submodule(path))[:, index] = 0
    return model


def adapt(attention: nn.Module, heads: int, head_dim: int) -> None:
    """What a narrower attention needs told: families that fix their width at construction."""
    attention.num_heads = heads
    attention.split_size = heads * head_dim


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt2", "opt", "bert", "gemma2", "gpt_neox", "phi", "phi3"]
)
def test_ffn_units(tiny, ids, family):
    model = tiny(family)
    block = anatomy.describe(model).blocks[1]
    units = ffn_units(block)
    assert len(units) == 48
    keep = [3, 0, 7, 40, 41]
    goal = logits(zeroed(model, units, [j for j in range(48) if j not in keep]), ids)
    assert (goal - logits(model, ids)).abs().max() > 1e-3
    narrow(model, *units.select(keep)).apply(model)
    torch.testing.assert_close(logits(model, ids), goal)
    assert anatomy.describe(model).blocks[1].mlp.width == 5


KV = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "bert", "gemma2", "gpt_neox", "phi"]


@pytest.mark.parametrize("family", KV)
def test_kv_groups(tiny, ids, family):
    model = tiny(family)
    block = anatomy.describe(model).blocks[0]
    attention = block.attention
    units = kv_groups(block)
    assert len(units) == attention.kv_heads
    keep = [1] if attention.kv_heads == 2 else [3, 1]
    dead = [m for m in range(len(units)) if m not in keep]
    goal = logits(zeroed(model, units, dead), ids)
    assert (goal - logits(model, ids)).abs().max() > 1e-3
    narrow(model, *units.select(keep)).apply(model)
    after = anatomy.describe(model).blocks[0].attention
    assert (after.heads, after.kv_heads, after.head_dim) == (2, len(keep), attention.head_dim)
    adapt(model.get_submodule(attention.path), after.heads, after.head_dim)
    torch.testing.assert_close(logits(model, ids), goal)


def test_units_partition_what_they_slice(tiny):
    for block in anatomy.describe(tiny("llama")).blocks:
        for units in (ffn_units(block), kv_groups(block)):
            whole_rows, whole_columns = units.select(range(len(units)))
            described = {w.path: w.shape for w in block.weights}
            for path, index in whole_rows.items():
                assert index.tolist() == list(range(described[path][0]))
            for path, index in whole_columns.items():
                assert index.tolist() == list(range(described[path][1]))


def test_the_order_of_keep_does_not_matter(tiny):
    units = kv_groups(anatomy.describe(tiny("gpt2")).blocks[0])
    one, other = units.select([2, 0]), units.select([0, 2])
    for a, b in zip(one, other, strict=True):
        assert {p: i.tolist() for p, i in a.items()} == {p: i.tolist() for p, i in b.items()}


@pytest.mark.parametrize("keep", [[], [-1], [48], [0, 99]])
def test_impossible_choices_are_refused(tiny, keep):
    units = ffn_units(anatomy.describe(tiny("llama")).blocks[0])
    with pytest.raises(UserError, match="of 0 to 47"):
        units.select(keep)


@pytest.mark.parametrize("units_of", [ffn_units, kv_groups])
def test_a_block_without_records_has_no_units(units_of):
    with pytest.raises(UserError, match="register the architecture"):
        units_of(Block("trunk.0", 0, None, None, ()))
