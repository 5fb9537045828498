"""Perplexity, bits per byte and accuracy as mathematics; intervals that cover what they should."""

import math

import numpy as np
import pytest
import torch

from rankine.errors import UserError
from rankine.evaluation.perplexity import (
    LanguageScore,
    gap_ratio,
    paired_bootstrap,
    perplexity,
)

TEXT = ["naïve text, " * 20, "more of it: ∑ x² = 3 " * 15]


def test_uniform_logits_give_the_vocabulary_size(uniform, tokenizer):
    score = perplexity(uniform, tokenizer, TEXT, window=50)
    assert score.perplexity == pytest.approx(257, rel=1e-6)
    # One token per byte: log2(257) bits per byte, but the end-of-text tokens stand for no byte.
    assert score.bits_per_byte == pytest.approx(
        math.log2(257) * score.tokens / score.bytes.sum(), rel=1e-6
    )


def test_every_window_loses_its_first_token_only(uniform, tokenizer):
    size = sum(len(t.encode()) for t in TEXT) + 2
    score = perplexity(uniform, tokenizer, TEXT, window=50)
    assert score.tokens == size - math.ceil(size / 50)
    assert score.counts.tolist() == [49] * (size // 50) + [size % 50 - 1]
    whole = perplexity(uniform, tokenizer, TEXT, window=10_000)
    assert whole.tokens == size - 1
    assert whole.bytes.sum() == size - 2 - 1
    overlapping = perplexity(uniform, tokenizer, TEXT, window=50, stride=20)
    assert overlapping.tokens == size - 1


def test_known_probabilities(oracle, tokenizer):
    # The rule puts probability p on the byte after the current one (in the alphabet), and the text
    # obeys it except at every tenth place.
    p = 0.7

    def rule(ids):
        logits = torch.full((*ids.shape, 257), math.log((1 - p) / 256))
        return logits.scatter(-1, ((ids + 1) % 257)[..., None], math.log(p))

    text = "".join(chr(33 + n % 90 if n % 10 else 40) for n in range(1000))
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    right = ((ids[1:] - ids[:-1]) % 257 == 1).double()
    assert 0.5 < right.mean() < 0.95
    expected = -(right * math.log(p) + (1 - right) * math.log((1 - p) / 256)).mean()
    score = perplexity(oracle(rule), tokenizer, [text], window=10_000)
    assert score.loss == pytest.approx(expected.item(), rel=1e-6)
    assert score.accuracy == pytest.approx(right.mean().item(), rel=1e-9)


def test_batching_changes_nothing(model, tokenizer):
    scores = [perplexity(model, tokenizer, TEXT, tokens_at_once=n) for n in (1, 200, 10_000)]
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0].nats, other.nats, rtol=1e-5)
        assert np.array_equal(scores[0].hits, other.hits)


def test_chunks_of_the_vocabulary_change_nothing(model, tokenizer, monkeypatch):
    from rankine.tasks import score

    whole = perplexity(model, tokenizer, TEXT)
    monkeypatch.setattr(score, "CHUNK", 257 * 7)
    np.testing.assert_allclose(perplexity(model, tokenizer, TEXT).nats, whole.nats, rtol=1e-6)


def test_equals_the_models_own_loss(model, tokenizer):
    text = ["def f(x): return x + 1  # and so on, longer than a window is" * 3]
    score = perplexity(model, tokenizer, text, window=64)
    ids = torch.tensor([tokenizer(text[0])["input_ids"][:64]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert score.nats[0] / score.counts[0] == pytest.approx(loss.item(), rel=1e-5)


def test_window_is_clamped_to_the_context(model, tokenizer):
    assert perplexity(model, tokenizer, TEXT, window=4096).counts.max() == 63


def test_max_tokens_and_mode(model, tokenizer):
    model.train()
    assert perplexity(model, tokenizer, TEXT, window=32, max_tokens=96).tokens == 93
    assert model.training
    model.eval()


def test_mistakes(model, tokenizer):
    with pytest.raises(UserError, match="at least two tokens"):
        perplexity(model, tokenizer, TEXT, max_tokens=1)
    with pytest.raises(UserError, match="stride between 1 and"):
        perplexity(model, tokenizer, TEXT, stride=65)


def test_infinite_loss_is_infinite_perplexity(oracle, tokenizer):
    def rule(ids):
        return torch.zeros(*ids.shape, 257).index_fill(-1, torch.tensor([0]), 1e4)

    score = perplexity(oracle(rule), tokenizer, TEXT)
    assert score.perplexity == math.inf
    assert math.isfinite(score.loss)


# -- intervals -------------------------------------------------------------------------------------
def drawn(generator, n, mean, noise=None):
    counts = generator.integers(20, 60, n)
    nats = counts * (mean + (0 if noise is None else noise))
    zeros = np.zeros(n, np.int64)
    return LanguageScore(nats, counts, zeros, zeros)


def pair(seed, n=80, difference=0.1):
    """Two scores whose windows share their difficulty, as two models on one text do."""
    generator = np.random.default_rng(seed)
    base = drawn(generator, n, 2.0, generator.normal(0, 0.5, n))
    own = generator.normal(0, 0.05, n)
    other = LanguageScore(
        base.nats + base.counts * (difference + own), base.counts, base.hits, base.bytes
    )
    return other, base


def test_interval_covers_a_known_difference():
    covered = [
        low <= 0.1 <= high
        for _, low, high in (paired_bootstrap(*pair(seed), samples=500) for seed in range(200))
    ]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_interval_of_a_perplexity_covers_the_truth_as_often_as_it_says():
    """Windows drawn from one distribution, whose mean is known: 95 of 100 intervals hold it."""
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        score = drawn(generator, 60, 2.0, generator.normal(0, 0.5, 60))
        low, high = score.perplexity_interval
        assert low < score.perplexity < high
        held += low < math.exp(2.0) < high
    assert 0.88 < held / 200 <= 1


def test_a_single_window_has_no_interval():
    assert drawn(np.random.default_rng(0), 1, 2.0).perplexity_interval is None


def test_pairing_is_what_makes_it_narrow():
    estimate, low, high = paired_bootstrap(*pair(0))
    assert low < estimate < high
    assert high - low < 0.03  # unpaired, the shared difficulty alone would give about 0.15
    assert low > 0


def test_seeded():
    a, b = pair(0)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    flipped = paired_bootstrap(b, a)
    assert flipped.estimate == -paired_bootstrap(a, b).estimate


def test_gap_ratio():
    half, dense = pair(1, difference=0.2)
    full, _ = pair(1, difference=0.5)
    estimate, low, high = gap_ratio(half, full, dense)
    assert low < 0.4 < high
    assert estimate == pytest.approx((half.loss - dense.loss) / (full.loss - dense.loss), rel=1e-12)
    assert gap_ratio(full, full, dense)[:] == pytest.approx((1, 1, 1))
    assert math.isnan(gap_ratio(half, dense, dense).estimate)


def test_scores_of_other_windows_are_refused():
    a, _ = pair(0)
    b, _ = pair(1)
    with pytest.raises(UserError, match="same windows"):
        paired_bootstrap(a, b)
