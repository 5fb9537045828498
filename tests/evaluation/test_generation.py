"""Degenerate is broken, not merely worse."""

import inspect
import json
import statistics
import textwrap

import pytest
import torch
from transformers import GenerationConfig

from rankine.errors import UserError
from rankine.evaluation.generation import (
    Sample,
    degenerate,
    draw,
    fitted,
    longest_cycle,
    repetition,
    sample,
)

MODULES = (inspect, json, statistics, textwrap)


def test_greedy_equals_generate(model, tokenizer):
    ids = tokenizer("def f(", return_tensors="pt")["input_ids"]
    config = GenerationConfig(
        max_new_tokens=20, do_sample=False, eos_token_id=256, pad_token_id=256
    )
    expected = model.generate(ids, generation_config=config)[0, ids.shape[1] :]
    found = draw(model, tokenizer, "def f(", new_tokens=20)
    assert list(found.tokens) == expected[expected != 256].tolist()
    assert sample(model, tokenizer, "def f(", new_tokens=20) == found.text


def test_a_sample_ends_with_the_context(model, tokenizer):
    """64 positions: generation of any length is asked for, and none is made up behind them."""

    def room(prompt, new_tokens):
        ids, left = fitted(model, torch.arange(prompt)[None], new_tokens)
        assert ids[0].tolist() == list(range(prompt))[-ids.shape[1] :]  # its end
        return ids.shape[1], left

    assert room(10, 20) == (10, 20)
    assert room(60, 4) == (60, 4)
    assert room(60, 200) == (32, 32)
    assert room(10, 200) == (10, 54)
    assert room(1000, 8) == (56, 8)
    assert len(draw(model, tokenizer, "x" * 90, temperature=5.0, new_tokens=200).tokens) <= 32
    with pytest.raises(UserError, match="at least one token"):
        draw(model, tokenizer, "")


def test_drawing_is_seeded(model, tokenizer):
    def drawn(seed):
        return draw(model, tokenizer, "a", temperature=1.0, seed=seed, new_tokens=16).tokens

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("module", MODULES)
def test_real_source_code_passes(module, tokenizer):
    # Every 64-byte piece of real source: byte tokens repeat far more than words do.
    ids = tokenizer(inspect.getsource(module))["input_ids"]
    pieces = [tuple(ids[i : i + 64]) for i in range(0, len(ids) - 64, 64)]
    flagged = [tokenizer.decode(p) for p in pieces if repetition(p)]
    # Rulers and long indentations are loops by any measure; they are rare.
    assert len(flagged) <= 0.03 * len(pieces), flagged


def test_random_tokens_pass():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert repetition(tuple(torch.randint(50, (64,), generator=generator).tolist())) is None


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([7] * 64, "one token"),
        ([1, 2, 3, *[7] * 61], "one token"),
        ([1, 2] * 32, "2 tokens over and over"),
        (list(range(12)) + [5, 6, 7, 8, 9] * 12, "5 tokens over and over"),
        (list(range(9)) * 8, "4-token sequences"),
    ],
)
def test_loops_are_found(tokens, reason):
    assert reason in repetition(tuple(tokens))


def test_short_output_is_not_judged():
    assert repetition((1,) * 10) is None


def test_a_cycle_needs_three_rounds():
    assert longest_cycle((1, 2, 3, 4, 1, 2, 3, 4), 4) == 0
    assert longest_cycle((1, 2, 1, 2, 1, 2), 2) == 6


def test_empty_and_not_finite(oracle, tokenizer):
    assert "empty" in Sample("p", " \n", (1, 2)).problem()
    assert "empty" in Sample("p", "", ()).problem()

    class Cached(oracle):
        def forward(self, input_ids, use_cache=True, past_key_values=None):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.rule(input_ids), past_key_values=None)

    broken = Cached(lambda ids: torch.full((*ids.shape, 257), torch.nan))
    assert "not finite" in draw(broken, tokenizer, "a").problem()
    stuck = Cached(
        lambda ids: torch.zeros(*ids.shape, 257).index_fill(-1, torch.tensor([65]), 99.0)
    )
    assert "one token" in draw(stuck, tokenizer, "a").problem()
    silent = Cached(
        lambda ids: torch.zeros(*ids.shape, 257).index_fill(-1, torch.tensor([256]), 99.0)
    )
    assert "empty" in draw(silent, tokenizer, "a").problem()
    prompts = ("a", "b", "c")
    assert "3 of 3 prompts" in degenerate(stuck, tokenizer, prompts)
    assert degenerate(stuck, tokenizer, prompts, dense=stuck) is None


def test_a_random_model_writes_nonsense_but_no_loops(model, tokenizer):
    assert degenerate(model, tokenizer, ("def f(", "import "), temperature=1.0) is None


@pytest.mark.parametrize("seed", range(3))
def test_drawn_output_of_an_ordinary_language_passes(oracle, tokenizer, seed):
    # Eight likely successors per byte, as a trained model has: no loops in what is drawn.
    from types import SimpleNamespace

    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(seed)) * 3

    class Bigrams(oracle):
        def forward(self, input_ids, use_cache=True, past_key_values=None):
            return SimpleNamespace(logits=self.rule(input_ids), past_key_values=None)

    assert degenerate(Bigrams(lambda ids: table[ids]), tokenizer, ("a", "b", "c", "d")) is None
