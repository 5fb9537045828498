"""Targets: their ids, and which weights globs choose."""

from __future__ import annotations

import pytest

from rankine import anatomy
from rankine.anatomy import Target, weight_targets
from rankine.errors import UserError


@pytest.fixture
def described(tiny):
    return anatomy.describe(tiny("llama"))


def test_a_plain_weight_is_named_by_its_path(described):
    weight = described.weight("model.layers.1.mlp.down_proj")
    target = Target((weight,))
    assert target.id == weight.path
    assert target.members == (weight.path,)
    assert target.shape == (32, 48)
    assert target.block == 1


def test_ids_of_competing_targets_differ(described):
    a, b, c = described.blocks[0].steps[0]
    targets = [
        Target((a,)),
        Target((a,), "residual"),
        Target((a, b), "pair"),
        Target((a, b), "group"),
        Target((a, b, c), "group"),
        Target((b, a), "group"),
        Target((a, b, c), "attention"),
    ]
    assert len({target.id for target in targets}) == len(targets)
    assert Target((a, b), "pair").id == f"pair:{a.path}+{b.path}"


def test_several_weights_have_no_single_shape(described):
    with pytest.raises(ValueError):  # noqa: PT011
        _ = Target(described.blocks[0].steps[0], "attention").shape


def test_a_group_is_a_stack(described):
    q, k, v = described.blocks[0].steps[0]
    group = Target((q, k, v), "group")
    assert group.shape == (q.shape[0] + k.shape[0] + v.shape[0], q.shape[1])
    assert group.size == group.shape[0] * group.shape[1]


def test_a_table_counts_what_is_tied_once(described):
    table = Target((described.weight("model.embed_tokens"), described.weight("lm_head")), "table")
    assert table.shape == described.weight("model.embed_tokens").shape
    assert table.size == table.shape[0] * table.shape[1]
    apart = Target(described.blocks[0].steps[2], "group")
    assert apart.size == 2 * apart.weights[0].shape[0] * apart.weights[0].shape[1]


def test_the_default_is_every_linear_inside_blocks(described):
    targets = weight_targets(described)
    assert [t.id for t in targets] == [w.path for w in described.linears]
    assert all(t.kind == "weight" for t in targets)


def test_include_chooses_anywhere_and_exclude_takes_away(described):
    ups = weight_targets(described, include=["*.up_proj"])
    assert [t.id for t in ups] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    head = weight_targets(described, include=["*.0.mlp.up_proj", "lm_head"])
    assert [t.id for t in head] == ["model.layers.0.mlp.up_proj", "lm_head"]
    rest = weight_targets(described, exclude=["model.layers.0.*", "lm_head"])
    assert {t.block for t in rest} == {1}


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_glob_that_matches_nothing_shows_real_paths(described, field):
    with pytest.raises(UserError, match=r'"\*\.q_prj".*self_attn\.q_proj'):
        weight_targets(described, **{field: ["*.up_proj", "*.q_prj"]})


def test_globs_that_leave_nothing_are_refused(described):
    with pytest.raises(UserError, match="leave nothing"):
        weight_targets(described, exclude=["*"])


def test_an_unknown_path_shows_real_ones(described):
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        described.weight("layers.9")


def test_stacked_experts_are_chosen_by_those_who_take_them(tiny):
    described = anatomy.describe(tiny("mixtral"))
    assert {t.weights[0].role for t in weight_targets(described)} == {"q", "k", "v", "o"}
    both = weight_targets(described, banks=True)
    assert [t.id for t in both] == [w.path for w in described.linears]
    bank = described.weight("model.layers.0.mlp.experts.down_bank")
    assert (bank.operator, bank.copies, bank.shape) == ("bank", 4, (32, 48))
    assert Target((bank,)).size == 4 * 32 * 48
    with pytest.raises(UserError, match="stacked experts"):
        weight_targets(described, include=["*.experts.*"])
