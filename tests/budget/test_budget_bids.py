"""Bids: how they nest, and what is refused before anything is allocated."""

import math
from dataclasses import replace

import numpy as np
import pytest
from budget_cases import bid

from rankine.budget import Bid, Knapsack, Option, Uniform, total_bits, total_loss
from rankine.budget.planting import plant
from rankine.errors import UserError


def refusal(bids):
    with pytest.raises(UserError) as error:
        Knapsack().allocate(bids, 10**6)
    return str(error.value)


def test_a_forest_of_three_levels():
    bids = [
        bid("a", [], 16),
        bid("abc", [], 48, ("a", "b", "c")),
        bid("c", [], 16),
        bid("ab", [], 32, ("a", "b")),
        bid("b", [], 16),
        bid("d", [], 16),
    ]
    forest = plant(bids)
    parent = {
        bids[forest.rivals[n][0]].target: p and bids[forest.rivals[p][0]].target
        for n, p in enumerate([int(p) if p >= 0 else None for p in forest.tree.parent])
    }
    assert parent == {"a": "ab", "b": "ab", "ab": "abc", "c": "abc", "abc": None, "d": None}
    assert [len(level) for level in forest.tree.levels] == [2, 2, 2]
    assert forest.dense_bits == 64


def test_rivals_share_a_node_and_one_of_them_is_chosen():
    low = bid("svd:w", [(4, 3.0)], 16, ("w",))
    quantized = bid("rtn:w", [(4, 1.0)], 16, ("w",))
    assert set(Knapsack().allocate([low, quantized], 8)) == {"rtn:w"}
    assert set(Knapsack().allocate([low, replace(quantized, scale=5.0)], 8)) == {"svd:w"}


def test_members_that_cross_are_refused():
    message = refusal([bid("ab", [], 32, ("a", "b")), bid("bc", [], 32, ("b", "c"))])
    assert "'ab'" in message
    assert "'bc'" in message
    assert "share only ['b']" in message


def test_children_that_leave_a_member_out_are_refused():
    message = refusal([bid("ab", [], 32, ("a", "b")), bid("a", [], 16)])
    assert "'ab'" in message
    assert "none covers ['b']" in message


def test_denominators_that_disagree_are_refused():
    assert "16 and 20" in refusal([bid("w", [], 16), bid("x", [], 20, ("w",))])
    nested = [bid("ab", [], 40, ("a", "b")), bid("a", [], 16), bid("b", [], 16)]
    assert "dense_bits 40" in refusal(nested)


def test_a_target_that_bids_twice_is_refused():
    assert "'w' bids twice" in refusal([bid("w", [], 16), bid("w", [], 16)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_name_the_target(value):
    message = refusal([bid("good", [(4, 1.0)], 16), bid("layer 7", [(4, value)], 16)])
    assert "'layer 7'" in message
    assert str(value) in message


@pytest.mark.parametrize("scale", [math.nan, -1.0, math.inf])
def test_scales_that_are_no_weights_name_the_target(scale):
    assert "'w'" in refusal([bid("w", [(4, 1.0)], 16, scale=scale)])


@pytest.mark.parametrize("bits", [-1, 4.5])
def test_bits_that_cannot_be_stored_name_the_target(bits):
    assert f"found {bits}" in refusal([bid("w", [(bits, 1.0)], 16)])


def test_a_bid_needs_members_and_options():
    with pytest.raises(UserError, match="no options"):
        Bid("w", ("w",), (), 16)
    with pytest.raises(UserError, match="different weights"):
        Bid("w", (), (Option("dense", 16, 0.0),), 16)
    with pytest.raises(UserError, match="different weights"):
        Bid("w", ("w", "w"), (Option("dense", 16, 0.0),), 32)


def test_negative_losses_are_noise():
    noisy = bid("w", [(4, -1e-9), (8, -0.5)], 16)
    chosen = Knapsack().allocate([noisy], 16)
    assert chosen["w"].bits == 4
    assert total_loss([noisy], chosen) == 0.0


def test_numpy_numbers_are_numbers():
    options = (Option("small", np.int64(4), np.float32(0.5)), Option("dense", np.int64(16), 0.0))
    chosen = Knapsack().allocate([Bid("w", ("w",), options, 16)], np.int64(8))
    assert chosen["w"].structure == "small"


def test_options_may_come_in_any_order_and_more_than_once():
    points = [(8, 1.0), (4, 3.0), (8, 1.0), (8, 2.0), (2, 9.0), (12, 1.5)]
    for budget, bits in [(16, 16), (15, 8), (7, 4), (3, 2)]:
        assert Knapsack().allocate([bid("w", points, 16)], budget)["w"].bits == bits


@pytest.mark.parametrize("rule", [Knapsack(), Uniform()])
def test_nothing_grows(rule):
    grown = bid("w", [(4, 2.0), (20, 0.0), (30, 1.0)], 16)
    assert rule.allocate([grown], 1000)["w"].bits == 16


def test_a_float32_model_is_dense_at_32_bits():
    w = Bid("w", ("w",), (Option("r", 24, 1.0), Option("dense", 32, 0.0)), 16)
    for rule in (Knapsack(), Uniform()):
        assert rule.allocate([w], 40)["w"].structure == "dense"
        assert rule.allocate([w], 31)["w"].structure == "r"


def test_without_a_dense_option_a_bid_may_still_take_16_bits_per_weight():
    residual = bid("w", [(0, 5.0), (8, 2.0), (16, 1.0), (20, 0.5)], 16, zero=False)
    assert Knapsack().allocate([residual], 100)["w"].bits == 16


def test_totals():
    bids = [bid("a", [(4, 2.0)], 16, scale=0.5), bid("b", [(8, 3.0)], 16)]
    chosen = {"a": bids[0].options[0], "b": bids[1].options[0]}
    assert total_bits(chosen) == 12
    assert total_loss(bids, chosen) == 4.0
    assert total_loss(bids[::-1], chosen) == 4.0


def test_the_same_target_under_five_levels():
    members = tuple("abcdef")
    bids = [
        bid(f"first {n}", [(2 * n, 8.0 / n)], 16 * n, members[:n]) for n in range(1, len(members))
    ]
    bids += [bid(member, [(4, 4.0)], 16) for member in members[1:-1]]
    chosen = Knapsack().allocate(bids, 10)
    assert set(chosen) == {"first 5"}
    covered = [m for b in bids if b.target in Knapsack().allocate(bids, 30) for m in b.members]
    assert sorted(covered) == sorted(members[:-1])
