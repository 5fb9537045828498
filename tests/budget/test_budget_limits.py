"""The knapsack at its limits: nothing to choose, too little budget, and a limit in seconds."""

from dataclasses import replace

import numpy as np
import pytest
from budget_cases import bid, covers, random_forest

from rankine.budget import Knapsack, total_bits, total_loss
from rankine.errors import BudgetError, UserError


def test_no_bids_and_one_bid():
    assert Knapsack().allocate([], 0) == {}
    assert Knapsack().smallest([], 0.0) == {}
    assert Knapsack().dual_bound([], 0) == 0.0
    only = bid("w", [], 16)
    assert Knapsack().allocate([only], 16)["w"].structure == "w/dense"
    assert Knapsack().smallest([only], 0.0)["w"].structure == "w/dense"


def test_a_budget_that_is_too_small_says_what_would_do():
    bids = [bid("a", [(4, 1.0)], 16), bid("b", [(5, 1.0)], 16)]
    with pytest.raises(BudgetError) as error:
        Knapsack().allocate(bids, 8)
    message = str(error.value)
    assert "8 bits (keep 0.2500)" in message
    assert "9 bits (keep 0.2812)" in message
    assert "keep 0.2813 or more" in message  # rounded up, so that it works when typed
    for budget in (0, -5):
        with pytest.raises(BudgetError):
            Knapsack().dual_bound(bids, budget)


def test_a_loss_that_is_too_small_says_what_would_do():
    residuals = [bid("a", [(0, 5.0), (8, 2.0)], 16, zero=False)]
    assert total_bits(Knapsack().smallest(residuals, 2.0)) == 8
    with pytest.raises(BudgetError, match=r"lose 2\. Allow 2 or more"):
        Knapsack().smallest(residuals, 1.0)
    for loss in (float("nan"), -1.0):
        with pytest.raises(UserError, match=f"found {loss}"):
            Knapsack().smallest(residuals, loss)


def timed(rng, bids):
    """The same bids with seconds that do not follow the bits."""
    return [
        replace(
            b, options=tuple(replace(o, seconds=int(rng.integers(1, 20)) / 8) for o in b.options)
        )
        for b in bids
    ]


def test_seconds_are_a_second_limit():
    rng = np.random.default_rng(3)
    for _ in range(25):
        bids = timed(rng, random_forest(rng))
        # Exhaustive over (bits, loss) and over (bits, seconds) lists covers in the same order.
        bits, loss = covers(bids)
        by_time = [
            replace(b, scale=1.0, options=tuple(replace(o, loss=o.seconds) for o in b.options))
            for b in bids
        ]
        seconds = covers(by_time)[1]
        budget, limit = int(rng.integers(bits.min(), bits.max() + 1)), float(rng.choice(seconds))
        both = (bits <= budget) & (seconds <= limit)
        rule = Knapsack(seconds=limit)
        if not both.any():
            least = seconds[bits <= budget].min()
            with pytest.raises(BudgetError, match=f"{least:g} seconds or more"):
                rule.allocate(bids, budget)
            continue
        chosen = rule.allocate(bids, budget)
        assert total_bits(chosen) <= budget
        assert sum(o.seconds for o in chosen.values()) <= limit
        assert total_loss(bids, chosen) == pytest.approx(loss[both].min(), abs=1e-6)

        enough = float(loss[both].min())
        fewest = rule.smallest(bids, enough + 1e-9)
        assert sum(o.seconds for o in fewest.values()) <= limit
        fits = (loss <= enough + 1e-9) & (seconds <= limit)
        assert total_bits(fewest) == bits[fits].min()


def test_a_limit_in_seconds_needs_seconds():
    with pytest.raises(UserError, match="'w' has seconds=None"):
        Knapsack(seconds=1.0).allocate([bid("w", [(4, 1.0)], 16)], 16)
