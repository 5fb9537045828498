"""Uniform, energy, threshold and entropic: each by its own mathematics."""

from dataclasses import replace

import numpy as np
import pytest
from budget_cases import bid, forests
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.budget import (
    Ceiling,
    Energy,
    Entropic,
    Knapsack,
    Threshold,
    Uniform,
    total_bits,
    total_loss,
)
from rankine.budget.planting import plant
from rankine.errors import BudgetError

RULES = [
    Uniform(),
    Energy(),
    Threshold(),
    Threshold(power=0.5),
    Ceiling(),
    Entropic(),
    Entropic("auto"),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def spectra(count=6, ranks=20, seed=0):
    """Bids whose losses are tails of squared singular values; 10 bits per rank, dense 200."""
    rng = np.random.default_rng(seed)
    bids, values = [], []
    for n in range(count):
        s = np.sort(rng.lognormal(0, rng.uniform(0.5, 2), ranks))[::-1]
        tails = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
        points = [(10 * r, float(tails[r])) for r in range(ranks)]
        bids.append(bid(f"w{n}", points, 10 * ranks, scale=float(rng.uniform(0.5, 2))))
        values.append(s)
    return bids, values


@every_rule
@given(bids=forests(), share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_budgets_are_kept_and_members_covered_once(rule, bids, share):
    forest = plant(bids)
    least = forest.smallest_bits()
    budget = int(least + share * (forest.dense_bits - least))
    chosen = rule.allocate(bids, budget)
    assert total_bits(chosen) <= budget
    members = [m for b in bids if b.target in chosen for m in b.members]
    assert sorted(members) == sorted({m for b in bids for m in b.members})


@every_rule
def test_no_rule_beats_the_knapsack(rule):
    bids, _ = spectra()
    for budget in (200, 500, 900):
        best = total_loss(bids, Knapsack().allocate(bids, budget))
        assert best <= total_loss(bids, rule.allocate(bids, budget)) + 1e-9


@every_rule
def test_all_of_the_budget_is_dense(rule):
    bids, _ = spectra()
    assert {o.bits for o in rule.allocate(bids, 1200).values()} == {200}


@every_rule
def test_what_cannot_fit_is_refused(rule):
    bids = [bid("a", [(4, 1.0)], 16), bid("b", [(5, 1.0)], 16)]
    assert total_bits(rule.allocate(bids, 9)) == 9
    with pytest.raises(BudgetError, match=r"keep 0\.2813 or more"):
        rule.allocate(bids, 8)


@every_rule
def test_no_bids_no_choice(rule):
    assert rule.allocate([], 100) == {}


@every_rule
def test_rivals_and_parents_compete(rule):
    bids = [
        bid("a", [(8, 4.0)], 16),
        bid("a:good", [(8, 1.0)], 16, ("a",)),
        bid("b", [(8, 4.0)], 16),
        bid("ab", [(16, 7.0)], 32, ("a", "b")),
    ]
    assert set(rule.allocate(bids, 16)) == {"a:good", "b"}
    better = bid("ab", [(16, 4.0)], 32, ("a", "b"))
    assert set(rule.allocate([*bids[:3], better], 16)) == {"ab"}


def test_uniform_gives_all_the_same_fraction():
    bids, _ = spectra()
    chosen = Uniform().allocate(bids, 629)  # 0.524 of dense: 10 ranks each, 29 bits left over
    assert {o.bits for o in chosen.values()} == {100}


def test_uniform_is_exact_at_decimal_fractions():
    bids = [bid(str(i), [(1120, 1.0), (1119, 2.0)], 1600) for i in range(7)]
    assert {o.bits for o in Uniform().allocate(bids, 7 * 1120).values()} == {1120}


def test_uniform_falls_only_when_a_target_offers_nothing_that_small():
    stubborn = bid("s", [], 200)
    bids = [bid(f"w{i}", [(10 * r, 20.0 - r) for r in range(20)], 200) for i in range(3)]
    chosen = Uniform().allocate([stubborn, *bids], 400)
    assert chosen["s"].bits == 200
    assert {chosen[b.target].bits for b in bids} == {60}  # (400 - 200) / 3, in ranks


def test_uniform_does_not_look_at_the_loss():
    flat = [bid("a", [(4, 0.0), (8, 0.0), (12, 0.0)], 16)]
    assert Uniform().allocate(flat, 13)["a"].bits == 12


@pytest.mark.parametrize("budget", [130, 400, 777, 1100])
def test_energy_has_one_level_for_all(budget):
    bids, _ = spectra()
    chosen = Energy().allocate(bids, budget)
    retained, below = [], []
    for b in bids:
        energy = [1 - o.loss / b.options[0].loss for o in b.options]
        rank = b.options.index(chosen[b.target])
        retained.append(energy[rank])
        below.append(energy[rank - 1] if rank else -1.0)
    # Some level lies between what the choices retain and what one rank less would.
    assert max(below) < min(retained)


@given(st.floats(1e-3, 1e3), st.integers(0, 5), st.sampled_from([Energy(), Threshold()]))
@settings(max_examples=20, deadline=None)
def test_normalised_rules_ignore_the_size_of_a_target(factor, which, rule):
    bids, _ = spectra()
    scaled = list(bids)
    scaled[which] = replace(bids[which], scale=bids[which].scale * factor)
    one, other = rule.allocate(bids, 500), rule.allocate(scaled, 500)
    assert {t: o.bits for t, o in one.items()} == {t: o.bits for t, o in other.items()}


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_threshold_cuts_normalised_singular_values_at_one_level(power):
    bids, values = spectra()
    chosen = Threshold(power=power).allocate(bids, 500)
    kept, cut = [], []
    for b, s in zip(bids, values, strict=True):
        rank = chosen[b.target].bits // 10
        normal = s / s[0]  # the same order for squares, so the power does not matter here
        kept += [*normal[:rank]]
        cut += [*normal[rank:]]
    assert min(kept) >= max(cut)
    assert sum(o.bits for o in chosen.values()) > 490


def test_threshold_reads_curves_that_are_not_convex():
    bumpy = bid("w", [(0, 10.0), (4, 9.5), (8, 2.0), (12, 1.9)], 16)
    steep = bid("x", [(0, 10.0), (8, 0.5)], 16)
    chosen = Threshold().allocate([bumpy, steep], 16)
    assert {o.bits for o in chosen.values()} == {8}  # never the option above the hull, at 4


@given(bids=forests(), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_ceiling_takes_the_smallest_option_below_one_loss(bids, share):
    """Against every ceiling in turn, on targets that contain no others."""
    flat = [replace(b, target=str(n), members=(str(n),)) for n, b in enumerate(bids)]
    least = sum(min(o.bits for o in b.options) for b in flat)
    budget = int(least + share * (sum(b.dense_bits for b in flat) - least))
    chosen = Ceiling().allocate(flat, budget)
    losses = {b.target: [b.scale * max(o.loss, 0.0) for o in b.options] for b in flat}
    best = 0
    for ceiling in [np.inf, *{loss for found in losses.values() for loss in found}]:
        sizes = [
            min((o.bits for o, loss in zip(b.options, losses[b.target]) if loss < ceiling),
                default=None)
            for b in flat
        ]  # fmt: skip
        if ceiling == np.inf:
            sizes = [min(o.bits for o in b.options) for b in flat]
        if None not in sizes and sum(sizes) <= budget:
            best = max(best, sum(sizes))
    assert total_bits(chosen) >= best


def test_ceiling_counts_the_scale_and_skips_what_is_worse_and_larger():
    bumpy = bid("w", [(2, 9.0), (4, 3.0), (8, 5.0), (12, 1.0)], 16)
    louder = bid("x", [(2, 9.0), (4, 3.0), (8, 5.0), (12, 1.0)], 16, scale=10.0)
    chosen = Ceiling().allocate([bumpy, louder], 17)
    assert (chosen["w"].bits, chosen["x"].bits) == (2, 12)  # 9 and 10 x 1
    assert {o.bits for o in Ceiling().allocate([bumpy, bid("y", [(4, 2.9)], 16)], 8).values()} == {
        4
    }


def entropic(score, keep, rule=None):
    points = [(r, 100.0 - r) for r in range(1000)]
    bids = [bid(str(i), points, 1000, scale=s) for i, s in enumerate(score)]
    chosen = (rule or Entropic()).allocate(bids, int(keep * 1000 * len(score)))
    return np.array([1 - chosen[b.target].bits / 1000 for b in bids])


def test_entropic_is_a_softmax_with_the_right_mean():
    score = np.array([0.3, 0.1, 0.2, 0.25])
    removed = entropic(score, 0.7, Entropic(epsilon=0.2))
    expected = np.exp(-score / 0.2)
    expected *= 0.3 / expected.mean()
    assert removed == pytest.approx(expected, abs=2e-3)
    assert list(np.argsort(removed)) == list(np.argsort(-score))


def test_entropic_redistributes_what_exceeds_the_cap():
    removed = entropic([0.0, 0.3, 0.5, 0.9], 0.6, Entropic(epsilon=0.1, cap=0.8))
    assert removed.mean() == pytest.approx(0.4, abs=2e-3)
    assert removed.max() <= 0.801
    assert removed[0] == pytest.approx(0.8, abs=2e-3)
    assert removed[1] / removed[2] == pytest.approx(np.exp(2.0), rel=0.02)


def test_entropic_turns_uniform_when_hot_or_asked_for_more_than_the_cap():
    score = [0.0, 0.3, 0.5, 0.9]
    assert entropic(score, 0.6, Entropic(epsilon=1e6)) == pytest.approx(0.4, abs=2e-3)
    assert entropic(score, 0.1, Entropic(epsilon=0.1)) == pytest.approx(0.9, abs=2e-3)


def test_entropic_finds_the_coldest_temperature_without_a_cut():
    score = np.array([0.02, 0.3, 0.5, 0.9])
    removed = entropic(score, 0.6, Entropic(epsilon="auto"))
    assert removed.mean() == pytest.approx(0.4, abs=2e-3)
    assert removed.max() == pytest.approx(0.8, abs=2e-3)
    logs = np.log(removed)  # still a softmax: logarithms are linear in the score
    slope = np.diff(logs) / np.diff(score)
    assert slope == pytest.approx(slope[0], rel=0.05)
    assert entropic(np.full(4, 0.3), 0.6, Entropic("auto")) == pytest.approx(0.4, abs=2e-3)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), min_size=1, max_size=12),
    st.floats(0, 0.99),
    st.floats(0.01, 10),
)
@settings(max_examples=60, deadline=None)
def test_entropic_fractions_keep_their_mean_cap_and_order(targets, mean, epsilon):
    score = np.array([s for s, _ in targets])
    weight = np.array([w for _, w in targets], dtype=float)
    weight /= weight.sum()
    for rule in (Entropic(epsilon), Entropic("auto")):
        removed = rule.removed(score, weight, mean)
        assert removed @ weight == pytest.approx(mean, abs=1e-6)
        assert removed.max() <= max(0.8, mean) + 1e-9
        order = np.argsort(score)
        assert np.all(np.diff(removed[order]) <= 1e-9)


def test_bids_inside_a_target_share_its_fraction():
    ranks = range(0, 32)
    bids = [
        bid("pair", [(r, 90.0) for r in ranks], 32, ("a", "b"), scale=0.1),
        bid("a", [(r, 16.0 - r) for r in range(16)], 16, scale=9.0),
        bid("b", [(r, 16.0 - r) for r in range(16)], 16, scale=0.0),
        bid("c", [(r, 32.0 - r) for r in ranks], 32, scale=0.1),
    ]
    chosen = Entropic().allocate(bids, 32)
    assert {t: o.bits for t, o in chosen.items()} == {"a": 8, "b": 8, "c": 16}
