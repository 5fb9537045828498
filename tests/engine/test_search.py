"""The question asked backwards: the smallest model that holds a loss."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.engine.search import TRIES, next_keep, parse_max_loss, smallest_that_holds
from rankine.errors import UserError
from rankine.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "nats"),
    [("1.02x", math.log(1.02)), ("0.05", 0.05), (" 1.5X ", math.log(1.5)), ("5e-2", 0.05)],
)
def test_both_units(text, nats):
    assert parse_max_loss(text) == pytest.approx(nats)


@pytest.mark.parametrize("text", ["1x", "0.9x", "-0.1", "0", "2 %", "", "x", "1..2x", "nan", "0x"])
def test_nonsense_is_one_sentence(text):
    with pytest.raises(UserError, match=r"1\.02x"):
        parse_max_loss(text)


KEEPS = st.integers(20, 196).map(lambda n: n / 200)


@settings(max_examples=200, deadline=None)
@given(
    tried=st.dictionaries(KEEPS, st.floats(-0.1, 5), min_size=1, max_size=5),
    allowed=st.floats(1e-4, 2),
)
def test_the_next_size_is_between_what_held_and_what_did_not(tried, allowed):
    keep = next_keep(tried, allowed)
    assert 0 < keep < 1
    assert keep * 200 == pytest.approx(round(keep * 200))
    holding = [k for k, gap in tried.items() if gap <= allowed]
    failing = [k for k, gap in tried.items() if gap > allowed]
    if holding:
        assert keep <= min(holding)
    if failing and (not holding or max(failing) < min(holding)):
        assert keep > max(failing) or keep in tried


class Fake:
    """A model whose held-out gap is a known function of keep."""

    def __init__(self, gap):
        self.gap, self.calls, self.works, self.known = gap, [], [], []

    def __call__(self, model, recipe, **more):
        self.calls.append((recipe.keep, more.get("output")))
        self.works.append(recipe.work)
        self.known.append(more["before"])
        perplexity = 10 * math.exp(self.gap(recipe.keep))
        rows = [
            {"kind": "dense", "perplexity": 10.0},
            {"kind": "baseline", "perplexity": 11.0},
            {"kind": "result", "perplexity": perplexity},
        ]
        report = {"rows": rows, "samples": [], "bytes_before": {}}
        return type("Result", (), {"report": report, "keep": recipe.keep})()


def search(gap, max_loss, **fields):
    fake = Fake(gap)
    method = {} if "stages" in fields else {"method": "svd"}
    recipe = Recipe.of(**{**method, "max_loss": max_loss, **fields})
    found = smallest_that_holds(fake, recipe, "embedded", "out", None, None, None)
    return found, fake


@pytest.mark.parametrize("steepness", [6.0, 9.0, 15.0])
@pytest.mark.parametrize("truth", [0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("bend", [0.0, 2.0])
def test_it_finds_the_smallest_within_a_few_runs(steepness, truth, bend):
    """ln(gap) is about linear in keep (here bent a little); the answer is known."""

    def gap(keep):
        return 0.1 * math.exp((truth - keep) * (steepness + bend * keep))

    found, fake = search(gap, "0.1")
    tried = [keep for keep, output in fake.calls if output is None]
    assert len(tried) <= TRIES
    assert fake.calls[-1] == (found.keep, "out")  # only the answer is written
    assert [output for _, output in fake.calls[:-1]] == [None] * (len(fake.calls) - 1)
    assert found.report["search"]["tried"].keys() == set(tried)
    assert truth - 1e-9 <= found.keep <= truth + 0.06


def test_each_try_has_a_work_directory_of_its_own_and_the_dense_model_is_measured_once():
    found, fake = search(lambda keep: 0.1 * math.exp(9 * (0.5 - keep)), "0.1", work="w")
    assert len(fake.works) == len(fake.calls) >= 3
    assert all(
        work == str(Path("w") / f"keep-{keep:g}")
        for work, (keep, _) in zip(fake.works, fake.calls, strict=True)
    )
    assert fake.works[-1] in fake.works[:-1]  # the last run goes on from the try that held
    assert fake.known[0] is None
    assert all(
        {row["kind"] for row in known["rows"]} == {"dense", "baseline"} for known in fake.known[1:]
    )
    assert found.keep == min(k for k, _ in fake.calls if k >= 0.5)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"method": "rtn"}, "knobs of rtn"),
        ({"stages": ({"method": "svd", "keep": 0.5},)}, "each stage"),
    ],
)
def test_what_has_no_size_to_search(asked, says):
    with pytest.raises(UserError, match=says):
        search(lambda keep: 0.0, "1.1x", **asked)


def test_what_never_holds_says_how_close_it_came():
    with pytest.raises(UserError) as caught:
        search(lambda keep: 1.0, "1.01x")
    assert "1.0000 at keep" in str(caught.value)


def test_the_budget_of_the_final_run_is_the_searchs():
    found, fake = search(lambda keep: 0.0, "1.5x")
    assert found.keep == min(keep for keep, _ in fake.calls) == pytest.approx(0.1)
