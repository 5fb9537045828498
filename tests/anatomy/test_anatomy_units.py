"""Slicing coupled units equals zeroing the others, on the running model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankine import anatomy
from rankine.anatomy import Block, Units, ffn_units, hidden_units, kv_groups
from rankine.checkpoint import load, save
from rankine.errors import UserError
from rankine.modules import module_at
from rankine.patch import Patch, narrow
from rankine.structures import matrix


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def zeroed(model: nn.Module, units: Units, dead: list[int]) -> nn.Module:
    """A copy in which nothing downstream reads the dead units."""
    model = copy.deepcopy(model)
    _, columns, _ = units.select(dead)
    with torch.no_grad():
        for path, index in columns.items():
            matrix(module_at(model, path))[..., index] = 0
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
            whole_rows, whole_columns, _ = units.select(range(len(units)))
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


# -- the residual stream --------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral", "qwen2_moe"])
def test_hidden_units(tiny, ids, family):
    """A root mean square over fewer dimensions is larger: with norms that make up for it, the
    narrower model is the one in which nobody writes the dead dimensions."""
    model = tiny(family)
    units = hidden_units(anatomy.describe(model), model)
    assert len(units) == 32
    keep = [j for j in range(32) if j % 4]
    dead = [j for j in range(32) if not j % 4]
    silent = copy.deepcopy(model)
    rows, columns, _ = units.select(dead)
    with torch.no_grad():
        for path, index in rows.items():
            matrix(module_at(silent, path))[..., index, :] = 0
    goal = logits(silent, ids)
    assert (goal - logits(model, ids)).abs().max() > 1e-3
    # Whoever reads a silent dimension might as well not.
    with torch.no_grad():
        for path, index in columns.items():
            if path != "lm_head":
                matrix(module_at(silent, path))[..., index] = 0
    torch.testing.assert_close(logits(silent, ids), goal)
    narrow(model, *units.select(keep)).apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_((32 / 24) ** 0.5)
    for module in model.modules():
        if hasattr(module, "hidden_dim"):  # routers, too, fix their width at construction
            module.hidden_dim = 24
    torch.testing.assert_close(logits(model, ids), goal, rtol=1e-3, atol=2e-3)
    assert model.get_input_embeddings().weight.shape == (48, 24)


def test_a_narrower_stream_keeps_its_ties_and_its_config(tiny, ids, tmp_path):
    model = tiny("llama")
    units = hidden_units(anatomy.describe(model), model)
    patch = narrow(model, *units.select(range(0, 32, 2)))
    assert patch.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    patch |= Patch(config={"hidden_size": 16})
    patch.apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path / "out", patch)
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


def test_a_stream_that_is_not_known_to_the_end_is_refused(tiny):
    for family in ("gemma", "bert"):  # a scaled embedding; a transformation behind the blocks
        model = tiny(family)
        with pytest.raises(UserError, match="hidden dimensions"):
            hidden_units(anatomy.describe(model), model)
